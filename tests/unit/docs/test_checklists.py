"""The production checklist and the page about accounts name what exists, and state true limits."""

import re
from pathlib import Path

import pytest
from latchkey_coherence.identifiers import ACCOUNT_ID
from latchkey_service.access.methods import METHODS
from latchkey_service.access.policy import parse
from latchkey_service.settings.settings import Settings

from tests.helpers.repository import ROOT

ACCOUNTS = (ROOT / "docs/accounts.md").read_text("utf-8")
PAGES = ("production", "accounts", "troubleshooting", "certificates")
# Settings of clients, which `Settings` does not have.
CLIENTS = {"LATCHKEY_TLS_CA", "LATCHKEY_CREDENTIAL_FILE"}


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    """Each setting that a page names exists."""
    known = {f"LATCHKEY_{name.upper()}" for name in Settings.model_fields} | CLIENTS
    named = set(re.findall(r"LATCHKEY_[A-Z_]+[A-Z]", (ROOT / f"docs/{page}.md").read_text("utf-8")))
    assert named
    assert named <= known


def test_forms_of_account_ids() -> None:
    """The page states the allowed characters and length, and its examples are account ids."""
    match = re.search(r"1-(\d+) characters of `([^`]+)`\. So ((?:`[^`]+`[^`]{2,5})+)", ACCOUNTS)
    assert match is not None
    assert ACCOUNT_ID.pattern == rf"[{match[2]}]{{1,{match[1]}}}"
    examples = re.findall(r"`([^`]+)`", match[3])
    assert len(examples) >= 3
    assert all(ACCOUNT_ID.fullmatch(example) for example in examples)


CONSOLE = ROOT / "clients/console/latchkey_console"
RPCS = {
    "list_page": "TokenService/List",
    "audit_page": "AuditService/List",
    "status": "StatusService/GetStatus",
}


def policies(text: str) -> list[str]:
    """Return the examples of policies in a page."""
    return re.findall(r"<!-- test: console policy -->\n```toml\n(.+?)```", text, re.DOTALL)


def called(*paths: Path) -> set[str]:
    """Return the methods that these modules call."""
    source = "".join(path.read_text("utf-8") for path in paths)
    methods = set(re.findall(r"client\.([a-z_]+)\(", source)) - {"close"}
    return {
        "/latchkey.v1."
        + RPCS.get(method, "TokenService/" + "".join(part.title() for part in method.split("_")))
        for method in methods
    }


def test_policy_of_a_console() -> None:
    """The entry is valid, and permits each call that the console makes, for all accounts."""
    (text,) = policies(ACCOUNTS)
    (caller,) = parse(text).credentials.values()
    assert caller.name == "console"
    assert caller.accounts is None
    assert caller.reports_people
    rpcs = called(*(path for path in CONSOLE.glob("*.py") if path.stem != "operations"))
    # The page says what it lacks without the audit log, which another role may read.
    rpcs.discard("/latchkey.v1.AuditService/List")
    assert len(rpcs) > 5
    for rpc in rpcs:
        assert METHODS[rpc].role == "manager", rpc


def test_policies_of_the_operators_view() -> None:
    """The entries are valid, and permit each call of the view, for all accounts. The smaller
    one permits nothing else."""
    callers = []
    for text in policies((ROOT / "docs/operators.md").read_text("utf-8")):
        (caller,) = parse(text).credentials.values()
        assert caller.accounts is None
        assert caller.reports_people
        callers.append(caller)
    whole, smaller = callers
    rpcs = called(CONSOLE / "operations.py")
    assert rpcs < whole.methods
    assert rpcs == smaller.methods
