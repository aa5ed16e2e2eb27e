"""The policy file: when it is read. What `look` finds is all that it goes by, so no test waits."""

from pathlib import Path

import pytest
from latchkey_service.access import policy_file
from latchkey_service.access.policy import parse
from latchkey_service.access.policy_file import PolicyFile
from structlog.testing import capture_logs

BEFORE = '[callers.old]\nroles = ["manager"]\n'
# The part is right, too, and has no word of accounts: all of them.
PART = '[callers.shop]\ncertificates = ["shop.internal"]\nroles = ["manager"]\n'
WHOLE = PART + 'accounts = ["acme"]\n'
BROKEN = '[callers.shop]\nroles = ["wizard"]\n'


class Followed:
    """A policy file, and what it was found to say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []
        path.write_text(BEFORE)
        self.file = PolicyFile(path, BEFORE, self.found.append)

    async def look(self, times: int = 1) -> list[str]:
        """Look some times in a row, and return all that was found right so far."""
        for _ in range(times):
            await self.file.look()
        return self.found

    def move_in(self, text: str) -> None:
        """Replace the file whole, by another one."""
        other = self.path.with_suffix(".new")
        other.write_text(text)
        other.replace(self.path)


@pytest.fixture
async def followed(tmp_path: Path) -> Followed:
    """A file that was read, and has not changed."""
    made = Followed(tmp_path / "policy.toml")
    assert await made.look(3) == []
    return made


async def test_a_change_is_found_by_the_second_look(followed: Followed) -> None:
    """Once, with the text that a new worker begins with."""
    followed.move_in(WHOLE)
    assert await followed.look() == []
    assert await followed.look() == [WHOLE]
    assert followed.file.text == WHOLE
    assert await followed.look(3) == [WHOLE]


async def test_a_file_that_is_being_written_is_not_read(followed: Followed) -> None:
    """However long the writing takes, no part of it is taken for the policy, though it is one, not
    when a reload is asked for either; and neither is the file while it is empty."""
    assert parse(PART).certificates["shop.internal"].accounts is None
    with followed.path.open("w") as file:
        await followed.look()
        for line in WHOLE.splitlines(keepends=True):
            file.write(line)
            file.flush()
            followed.file.reload()
            assert await followed.look() == []
    assert await followed.look() == [WHOLE]


async def test_a_change_while_it_is_read(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is not taken if the file is another one by then, and neither is it told that
    it is wrong; the next looks find the whole."""
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
        with capture_logs() as log:
            assert await followed.look(2) == []
            assert await followed.look(2) == [WHOLE]
        assert log == []
        followed.move_in(BEFORE)
        assert await followed.look(2) == [WHOLE, BEFORE]
        followed.found.clear()


async def test_a_file_that_is_broken(followed: Followed) -> None:
    """It is told once, and again when asked for; what was right before stays, and so it does when
    the file is away or cannot be read."""
    followed.move_in(BROKEN)
    with capture_logs() as log:
        await followed.look(5)
        assert [line["event"] for line in log] == ["policy refused"]
        assert "line 2: callers.shop.roles" in log[0]["error"]
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
    """The file is read when that is asked for, though it looks as it did before."""
    monkeypatch.setattr(policy_file, "_signature", lambda _: "the same")
    await followed.look(2)
    followed.move_in(WHOLE)
    assert await followed.look(3) == []
    followed.file.reload()
    assert await followed.look() == [WHOLE]


async def test_whatever_a_file_does_to_the_reader(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw is a file that is refused, once, and the next one is read again."""

    def fail(_: str) -> None:
        raise MemoryError

    followed.move_in(WHOLE)
    with monkeypatch.context() as patched, capture_logs() as lines:
        patched.setattr(policy_file, "parse", fail)
        assert await followed.look(4) == []
    assert [line["error"] for line in lines] == ["cannot be understood (MemoryError)"]
    followed.move_in(PART)
    assert await followed.look(2) == [PART]
