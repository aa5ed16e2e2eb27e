"""When the policy file is read. Only calls of `look` check the file, so no test has to wait."""

from pathlib import Path

import pytest
from latchkey_service.access import policy_file
from latchkey_service.access.policy import parse
from latchkey_service.access.policy_file import PolicyFile

from tests.helpers.captured_log import Lines

BEFORE = '[callers.old]\nroles = ["manager"]\n'
# The part is valid too, but without `accounts` it allows all accounts.
PART = '[callers.shop]\ncertificates = ["shop.internal"]\nroles = ["manager"]\n'
WHOLE = PART + 'accounts = ["acme"]\n'
BROKEN = '[callers.shop]\nroles = ["wizard"]\n'


class Followed:
    """A policy file and the texts that were accepted from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []
        path.write_text(BEFORE)
        self.file = PolicyFile(path, BEFORE, self.found.append)
        self.log = Lines()
        self.file._log = self.log  # type: ignore[assignment]  # in its place

    async def look(self, times: int = 1) -> list[str]:
        """Check the file some times in a row; return all texts accepted so far."""
        for _ in range(times):
            await self.file.look()
        return self.found

    def move_in(self, text: str) -> None:
        """Replace the whole file by a rename."""
        other = self.path.with_suffix(".new")
        other.write_text(text)
        other.replace(self.path)


@pytest.fixture
async def followed(tmp_path: Path) -> Followed:
    """A file that was read and has not changed since."""
    made = Followed(tmp_path / "policy.toml")
    assert await made.look(3) == []
    return made


async def test_second_look_finds_a_change(followed: Followed) -> None:
    """A change is found once, with the text that a new worker also gets."""
    followed.move_in(WHOLE)
    assert await followed.look() == []
    assert await followed.look() == [WHOLE]
    assert followed.file.text == WHOLE
    assert await followed.look(3) == [WHOLE]


async def test_half_written_file_is_not_read(followed: Followed) -> None:
    """However long the writing takes, a part of the file is never used as the policy, even if it is
    valid and a reload is requested. Neither is the empty file."""
    assert parse(PART).certificates["shop.internal"].accounts is None
    with followed.path.open("w") as file:
        await followed.look()
        for line in WHOLE.splitlines(keepends=True):
            file.write(line)
            file.flush()
            followed.file.reload()
            assert await followed.look() == []
    assert await followed.look() == [WHOLE]


async def test_file_that_changes_while_it_is_read(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is discarded if the file has changed since, and no error about it is logged. Later
    checks find the whole file."""
    read_text = policy_file.read_text

    def read_before_the_rest(path: Path) -> str:
        text = read_text(path)
        monkeypatch.undo()
        with path.open("a") as file:
            file.write(WHOLE.removeprefix(text))
        return text

    for part in (PART, PART + "acc"):
        followed.move_in(part)
        monkeypatch.setattr(policy_file, "read_text", read_before_the_rest)
        assert await followed.look(2) == []
        assert await followed.look(2) == [WHOLE]
        assert followed.log == []
        followed.move_in(BEFORE)
        assert await followed.look(2) == [WHOLE, BEFORE]
        followed.found.clear()


async def test_invalid_file(followed: Followed) -> None:
    """An invalid file is logged once, and again on request. The last valid policy stays active,
    even if the file is missing or unreadable."""
    followed.move_in(BROKEN)
    log = followed.log
    await followed.look(5)
    assert [line["event"] for line in log] == ["policy rejected"]
    assert "callers.shop.roles: " in log[0]["error"]
    followed.file.reload()
    await followed.look(5)
    assert len(log) == 2
    followed.path.unlink()
    await followed.look(5)
    assert len(log) == 3
    assert "No such file" in log[2]["error"]
    assert (followed.found, followed.file.text) == ([], BEFORE)
    followed.move_in(WHOLE)
    assert await followed.look(2) == [WHOLE]


async def test_reload(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload reads the file even if it looks unchanged."""
    monkeypatch.setattr(policy_file, "_signature", lambda _: "the same")
    await followed.look(2)
    followed.move_in(WHOLE)
    assert await followed.look(3) == []
    followed.file.reload()
    assert await followed.look() == [WHOLE]


async def test_unexpected_exception(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen exception is logged once, and the next version of the file is read again."""

    def fail(_: str) -> None:
        raise MemoryError

    followed.move_in(WHOLE)
    with monkeypatch.context() as patched:
        patched.setattr(policy_file, "parse", fail)
        assert await followed.look(4) == []
    assert [line["error"] for line in followed.log] == ["cannot be parsed (MemoryError)"]
    followed.move_in(PART)
    assert await followed.look(2) == [PART]
