"""The command `policy` of the service: new callers, and checks of a policy file."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from latchkey_service.access import policy as policies
from latchkey_service.access.credentials import digest_of

from tests.helpers.fork_server import Forked

USAGE = (
    "usage: latchkey policy new-caller NAME [--role ROLE ...] [--account ID ...] [--output FILE]"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def policy_command(forked: Forked) -> Run:
    """Run `python -m latchkey_service policy`."""

    def run(
        *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            forked("latchkey_service", "policy", *arguments),
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def test_a_new_callers_credential(folder: Path, policy_command: Run) -> None:
    """`policy new-caller` prints only a credential on standard output, and separately the policy
    entry for it, which is valid as printed. `policy check` reports mistakes."""
    made = policy_command("new-caller", "shop")
    assert made.returncode == 0
    text = made.stdout.removesuffix("\n")
    assert text.startswith("lkc_")
    assert text not in made.stderr
    assert f"sha256:{digest_of(text).hex()}" in made.stderr
    path = folder / "policy.toml"
    path.write_text(made.stderr[made.stderr.index("[callers.shop]") :])
    checked = policy_command("check", LATCHKEY_POLICY=str(path))
    assert (checked.returncode, checked.stdout) == (0, f"{path} is valid: 1 callers\n")
    path.write_text("[callers.shop]\nrole = []")
    checked = policy_command("check", str(path))
    assert checked.returncode == 1
    assert f"{path}: callers.shop.role: " in checked.stderr
    for names in (("a b",), (), ("a", "b")):
        failed = policy_command("new-caller", *names)
        assert (failed.returncode, failed.stdout) == (2, "")
        # An error message does not reach a policy file to which the output is appended.
        assert not policies.parse(failed.stderr).callers


def test_policy_check_uses_the_services_policy(folder: Path, policy_command: Run) -> None:
    """`policy check` without a file uses LATCHKEY_POLICY as the service does, even from `.env`. It
    reports a missing LATCHKEY_POLICY and other invalid settings."""
    (folder / "good.toml").write_text('[callers.shop]\ncertificates = ["shop.internal"]\n')
    (folder / ".env").write_text("LATCHKEY_POLICY=good.toml\n")
    checked = policy_command("check", cwd=folder)
    assert (checked.returncode, checked.stdout) == (0, "good.toml is valid: 1 callers\n"), checked
    checked = policy_command("check", cwd=folder, LATCHKEY_POLICY="other.toml")
    assert (checked.returncode, "other.toml: cannot be read" in checked.stderr) == (1, True)
    # Inconsistent settings do not matter here; unparseable ones do.
    checked = policy_command("check", cwd=folder, LATCHKEY_LISTEN="0.0.0.0:1")
    assert checked.returncode == 0
    checked = policy_command("check", cwd=folder, LATCHKEY_WORKERS="0")
    assert (checked.returncode, "LATCHKEY_WORKERS: " in checked.stderr) == (2, True)
    (folder / ".env").unlink()
    checked = policy_command("check", cwd=folder)
    assert checked.returncode == 2
    assert checked.stderr == "latchkey: name a file, or set LATCHKEY_POLICY\n"


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ((), "expected new-caller or check"),
        (("make-tea",), "the first argument must be new-caller or check"),
        (("check", "a", "b"), "check takes one file"),
    ],
)
def test_wrong_arguments_of_a_policy_command(
    arguments: tuple[str, ...], mistake: str, policy_command: Run
) -> None:
    """A wrong argument is reported with the expected form, under the command's own name."""
    done = policy_command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"latchkey: policy: {mistake}",
        USAGE,
        "       latchkey policy check [FILE]",
    ]


def test_new_callers_are_added_to_a_policy_file(folder: Path, policy_command: Run) -> None:
    """With --output, the file gets the caller with its roles and accounts. A second caller joins
    the first. A mistake leaves the file as it was and creates no credential."""
    path = folder / "policy.toml"
    output = f"--output={path}"
    made = policy_command("new-caller", "shop", "--role=manager", "--account", "acme", output)
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith(f"{path} now has the caller shop")
    made = policy_command("new-caller", "web", output)
    assert made.returncode == 0, made.stderr
    policy = policies.parse(path.read_text())
    assert policy.callers == {"shop", "web"}
    shop = next(c for c in policy.credentials.values() if c.name == "shop")
    web = policy.credentials[digest_of(made.stdout.strip())]
    assert shop.accounts is not None
    assert shop.accounts.allow("acme")
    assert not shop.accounts.allow("other")
    assert "/latchkey.v1.TokenService/Create" in shop.methods
    assert web.accounts is None
    assert "/latchkey.v1.TokenService/Create" not in web.methods
    before = path.read_bytes()
    for arguments, words in (
        (("web", output), "already has the caller web"),
        (("x", "--role=nope", output), "unknown role 'nope'"),
        (("x", "--account=a b", output), "neither an account nor a prefix"),
        (("x", "--colour=red", output), "--colour"),
        (("x", f"--output={folder}/none/policy.toml"), "cannot write"),
    ):
        failed = policy_command("new-caller", *arguments)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert words in failed.stderr
        assert "no credential was created" in failed.stderr
    assert path.read_bytes() == before


def test_check_reports_callers_that_no_call_can_be_from(folder: Path, policy_command: Run) -> None:
    """A caller with neither credentials nor certificates is a mistake, and the file is not called
    valid."""
    path = folder / "policy.toml"
    path.write_text(
        '[callers.shop]\nroles = ["manager"]\n[callers.web]\ncertificates = ["web.internal"]\n'
    )
    checked = policy_command("check", str(path))
    assert (checked.returncode, checked.stdout) == (1, "")
    assert "the caller shop has neither credentials nor certificates" in checked.stderr
    assert "web" not in checked.stderr
