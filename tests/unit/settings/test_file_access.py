"""Which owners and modes of keys, policies and settings are refused, and which are warned about."""

import os
from pathlib import Path

import pytest
from latchkey_service.settings import file_access
from latchkey_service.settings.file_access import (
    CERTIFICATE,
    ENVIRONMENT,
    PEPPERS,
    POLICY,
    TLS_KEY,
    Rule,
)

US, SOMEBODY, ROOT = 10_001, 1_000, 0
RULES = [PEPPERS, TLS_KEY, ENVIRONMENT, POLICY, CERTIFICATE]
PATH = Path("/etc/latchkey/file")


class File:
    """A path with an owner and a mode of our choice."""

    def __init__(self, owner: int, mode: int) -> None:
        self.status = os.stat_result((0o100000 | mode, 1, 1, 1, owner, 0, 0, 0, 0, 0))

    def stat(self) -> os.stat_result:
        return self.status

    def __str__(self) -> str:
        return str(PATH)


@pytest.fixture(autouse=True)
def us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: US)


def verdict(rule: Rule, owner: int, mode: int) -> tuple[str | None, str | None]:
    """Return the refusal and the warning."""
    file = File(owner, mode)
    warning = file_access.warning(file, rule)  # type: ignore[arg-type]  # has what it uses of a path
    return file_access.refusal(PATH, file.status, rule), warning


@pytest.mark.parametrize(
    ("rule", "owner", "mode"),
    [
        (PEPPERS, US, 0o600),
        (PEPPERS, US, 0o400),
        # As Kubernetes mounts a secret for fsGroup.
        (PEPPERS, ROOT, 0o440),
        (PEPPERS, ROOT, 0o640),
        (TLS_KEY, US, 0o400),
        (TLS_KEY, ROOT, 0o440),
        (ENVIRONMENT, US, 0o600),
        (ENVIRONMENT, US, 0o640),
        (ENVIRONMENT, ROOT, 0o640),
        (POLICY, US, 0o640),
        (POLICY, ROOT, 0o440),
        (CERTIFICATE, US, 0o644),
        (CERTIFICATE, ROOT, 0o444),
    ],
)
def test_accepted(rule: Rule, owner: int, mode: int) -> None:
    """Keys that only we can read, or that root lets our group read; files that only we or root can
    change."""
    assert verdict(rule, owner, mode) == (None, None)


@pytest.mark.parametrize(
    ("rule", "owner", "mode", "words"),
    [
        (PEPPERS, US, 0o640, ["its group can read", "chmod 600"]),
        (PEPPERS, US, 0o604, ["other users can read", "chmod 600"]),
        (PEPPERS, ROOT, 0o644, ["other users can read", "chmod 640"]),
        (PEPPERS, ROOT, 0o460, ["its group can change", "chmod 640"]),
        (PEPPERS, SOMEBODY, 0o600, ["another user", "chown"]),
        (TLS_KEY, US, 0o644, ["other users can read", "chmod 600"]),
        (TLS_KEY, SOMEBODY, 0o644, ["another user", "chown"]),
        (TLS_KEY, ROOT, 0o666, ["other users can change", "chmod 640"]),
        (ENVIRONMENT, US, 0o666, ["other users can change", "chmod 600"]),
        (ENVIRONMENT, SOMEBODY, 0o600, ["another user", "chown"]),
        (POLICY, US, 0o646, ["other users can change", "chmod 640"]),
        (POLICY, ROOT, 0o642, ["other users can change", "chmod 640"]),
        (POLICY, SOMEBODY, 0o666, ["other users can change"]),
        (CERTIFICATE, US, 0o666, ["other users can change", "chmod 644"]),
    ],
)
def test_refused(rule: Rule, owner: int, mode: int, words: list[str]) -> None:
    """The message names the file and the command that helps."""
    found, _ = verdict(rule, owner, mode)
    assert found is not None
    for word in [*words, str(PATH)]:
        assert word in found


@pytest.mark.parametrize(
    ("rule", "owner", "mode", "words"),
    [
        # As Kubernetes mounts a secret by default.
        (TLS_KEY, ROOT, 0o644, ["other users can read", "chmod 640"]),
        (ENVIRONMENT, US, 0o644, ["other users can read", "chmod 600"]),
        (POLICY, US, 0o644, ["other users can read", "chmod 640"]),
        (POLICY, US, 0o660, ["its group can change", "chmod 640"]),
        # As Docker mounts a file of the host.
        (POLICY, SOMEBODY, 0o644, ["another user", "chown"]),
        (CERTIFICATE, SOMEBODY, 0o644, ["another user", "chown"]),
        (CERTIFICATE, US, 0o664, ["its group can change", "chmod 644"]),
    ],
)
def test_warned(rule: Rule, owner: int, mode: int, words: list[str]) -> None:
    """A file that may be used nevertheless gets a warning that names it and the command."""
    refusal, found = verdict(rule, owner, mode)
    assert refusal is None
    assert found is not None
    for word in [*words, str(PATH)]:
        assert word in found


@pytest.mark.parametrize("rule", RULES)
def test_root_follows_the_rules_for_root(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    """If we are root, our files are those of root, and the group of root may read keys."""
    monkeypatch.setattr(os, "geteuid", lambda: ROOT)
    assert verdict(rule, ROOT, 0o640) == (None, None)
    refusal, warning = verdict(rule, SOMEBODY, 0o600)
    assert "another user" in (refusal or warning or "")


def test_a_missing_file_is_reported_elsewhere(tmp_path: Path) -> None:
    """The reader of a file, not this check, reports that it is missing."""
    assert file_access.warning(tmp_path / "missing", POLICY) is None
