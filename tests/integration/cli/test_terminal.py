"""The command line tool on a terminal, with prompts."""

import asyncio
import os
import pty
import re
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.fork_server import Forked

TIMEOUT_SECONDS = 20


class Terminal:
    """A process on a pseudo-terminal of 80 columns."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.screen = ""
        self._process = process
        self._descriptor = descriptor
        self._changed = asyncio.Event()
        self._ended = False
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 65_536)
        except OSError:  # EIO: the last process on the terminal has exited
            data = b""
        if not data:
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self.screen += data.decode()
        self._changed.set()

    async def until(self, text: str) -> None:
        """Wait until the screen shows `text`."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while text not in self.screen:
                assert not self._ended, self.screen
                self._changed.clear()
                await self._changed.wait()

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def end(self) -> int:
        """Wait until the process exits and return its exit code."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not self._ended:
                self._changed.clear()
                await self._changed.wait()
            return await self._process.wait()

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


Open = Callable[..., Awaitable[Terminal]]
Create = Callable[..., Awaitable[pb.CreateResponse]]


@pytest.fixture
async def start(address: str, tmp_path: Path, forked: Forked) -> AsyncIterator[Open]:
    """Start the tool on a terminal, which is its controlling terminal: getpass opens it, and it
    sends Ctrl-C."""
    terminals: list[Terminal] = []

    async def start(*arguments: str, **environment: str) -> Terminal:
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        try:
            process = await asyncio.create_subprocess_exec(
                *forked("latchkey_cli", *arguments, terminal=True),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=tmp_path,
                env={
                    "PATH": os.defpath,
                    "HOME": str(tmp_path),
                    "LANG": "C.UTF-8",
                    "TERM": "xterm-256color",
                    "LATCHKEY_TARGET": address,
                    "LATCHKEY_ACCOUNT": "acme",
                    **environment,
                },
            )
        finally:
            os.close(slave)
        terminals.append(Terminal(process, master))
        return terminals[-1]

    yield start
    for terminal in terminals:
        await terminal.close()


async def test_secret_prompt_is_hidden(start: Open, create: Create) -> None:
    """On a terminal, the typed secret never appears on the screen."""
    secret = (await create()).secret
    terminal = await start("verify", "--scope", "read")
    await terminal.until("Secret (not shown): ")
    terminal.type(secret + "\n")
    assert await terminal.end() == 0
    assert "VALID" in terminal.screen
    assert secret not in terminal.screen


async def test_ctrl_c_at_a_prompt_exits_130_quietly(start: Open, create: Create) -> None:
    """The first Ctrl-C at a prompt exits without any effect and without a traceback."""
    token = (await create(name="deploy bot")).token
    prompts = {"verify": "Secret (not shown): ", f"delete {token.id}": "[y/N] "}
    for command, prompt in prompts.items():
        terminal = await start(*command.split())
        await terminal.until(prompt)
        terminal.type("\x03")
        assert await terminal.end() == 130
        assert "Traceback" not in terminal.screen
        assert "Deleted" not in terminal.screen


async def test_delete_asks_for_confirmation(start: Open, create: Create) -> None:
    """Each prompt names the token. Only yes deletes it, and no has its own exit code."""
    first = (await create(name="deploy bot")).token
    second = (await create(name="backup")).token
    terminal = await start("delete", first.id, second.id)
    await terminal.until("[y/N] ")
    question = " ".join(terminal.screen.split())
    assert f"'deploy bot' (scope read, {first.hint}, {first.id})" in question
    terminal.type("\n")
    await terminal.until("Kept")
    await terminal.until("'backup'")
    terminal.type("y\n")
    assert await terminal.end() == 1
    assert "Deleted" in terminal.screen

    # The token is already deleted, so its receipt appears without a prompt.
    terminal = await start("delete", second.id)
    assert await terminal.end() == 0
    assert "[y/N]" not in terminal.screen


async def test_invalidate_all_asks_for_confirmation(start: Open, stub: Any, create: Create) -> None:
    """Only yes clears the caches. No and Ctrl-C use no revision and have their own exit codes."""
    secret = (await create()).secret

    async def revision() -> int:
        created = await create()
        request = pb.DeleteRequest(account_id="acme", id=created.token.id)
        return (await stub.Delete(request)).receipt.revision

    for typed, code in (("n\n", 1), ("\n", 1), ("\x03", 130), ("y\n", 0)):
        before = await revision()
        terminal = await start("invalidate-all")
        await terminal.until("Clear the cache of every verifier? [y/N]")
        terminal.type(typed)
        assert await terminal.end() == code
        assert ("Cleared" in terminal.screen) is (code == 0)
        assert await revision() == before + 1 + (code == 0)
    assert (await stub.Verify(pb.VerifyRequest(secret=secret))).verdict == pb.VERDICT_VALID


async def test_create_shows_token_and_secret_once(start: Open) -> None:
    """The terminal shows the token, the unwrapped secret, and a note that it is shown only once."""
    terminal = await start("create", "[red]deploy[/red]", "--scope", "write", "--expires", "30d")
    assert await terminal.end() == 0
    assert "[red]deploy[/red]" in terminal.screen
    assert len(re.findall(r"^lk_[0-9A-Za-z]{57}\r$", terminal.screen, re.MULTILINE)) == 1
    assert "shown only once" in terminal.screen
    assert "(in 30 days)" in terminal.screen


async def test_no_color_is_honoured(start: Open, create: Create) -> None:
    """NO_COLOR turns the terminal's colours off."""
    await create(scope=pb.SCOPE_WRITE)
    colour = re.compile(r"\x1b\[(\d+;)*(3[0-7]|9[0-7]|38;[0-9;]+)m")
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = await start("list", **environment)
        assert await terminal.end() == 0
        assert "Expires" in terminal.screen
        assert bool(colour.search(terminal.screen)) is coloured


async def test_ids_can_be_copied_at_any_width(start: Open, create: Create) -> None:
    """At 80 columns and more, the list and the audit log show every field, and a token's ID never
    wraps."""
    token = (await create(name="deploy bot")).token
    for columns in (80, 100, 160):
        for command in ("list", "audit"):
            terminal = await start(command, COLUMNS=str(columns))
            assert await terminal.end() == 0
            assert token.id in terminal.screen, (command, columns)
            plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.screen)
            assert max(map(len, plain.splitlines())) <= columns
            words = ("deploy", "bot") if command == "list" else ("Create", "acme", "ok", "ipv4:")
            assert all(word in plain for word in words), (command, columns, plain)


async def test_rotate_asks_before_it_ends_the_older_secrets(
    start: Open, stub: Any, create: Create
) -> None:
    """The prompt names the token. Only yes rotates. With a grace there is no prompt, and the new
    secret is shown in one line."""
    created = await create(name="deploy bot")
    verify = pb.VerifyRequest(secret=created.secret)
    terminal = await start("rotate", created.token.id)
    await terminal.until("[y/N] ")
    assert "'deploy bot'" in " ".join(terminal.screen.split())
    terminal.type("n\n")
    assert await terminal.end() == 1
    assert (await stub.Verify(verify)).verdict == pb.VERDICT_VALID

    terminal = await start("rotate", created.token.id, "--grace", "1d")
    assert await terminal.end() == 0
    assert "[y/N]" not in terminal.screen
    assert len(re.findall(r"^lk_[0-9A-Za-z]{57}\r$", terminal.screen, re.MULTILINE)) == 1
    assert "shown only once" in terminal.screen
    assert (await stub.Verify(verify)).verdict == pb.VERDICT_VALID

    terminal = await start("retire-secrets", created.token.id)
    await terminal.until("[y/N] ")
    terminal.type("y\n")
    assert await terminal.end() == 0
    assert "Ended the older secrets" in terminal.screen
    assert (await stub.Verify(verify)).verdict == pb.VERDICT_EXPIRED


async def test_delete_all_asks_with_the_count(start: Open, stub: Any, create: Create) -> None:
    """The prompt says how many tokens match. Only yes deletes them."""
    for number in range(3):
        await create(name=f"job {number}")

    async def left() -> int:
        return len((await stub.List(pb.ListRequest(account_id="acme"))).tokens)

    for typed, code in (("n\n", 1), ("\x03", 130), ("y\n", 0)):
        terminal = await start("delete-all")
        await terminal.until("Delete 3 tokens of account 'acme' permanently? [y/N] ")
        terminal.type(typed)
        assert await terminal.end() == code
        assert await left() == (0 if code == 0 else 3)
    assert " 3 tokens\r" in terminal.screen
    nothing = await start("delete-all")
    assert await nothing.end() == 0
    assert "has no such tokens" in nothing.screen


async def test_revoke_prompts_for_a_hidden_secret(start: Open, stub: Any, create: Create) -> None:
    """On a terminal, one secret is asked for, and it never appears on the screen."""
    secret = (await create()).secret
    terminal = await start("revoke")
    await terminal.until("Secret (not shown): ")
    terminal.type(secret + "\n")
    assert await terminal.end() == 0
    assert "line 1: ended" in terminal.screen
    assert secret not in terminal.screen
    answer = await stub.Verify(pb.VerifyRequest(secret=secret))
    assert answer.verdict == pb.VERDICT_EXPIRED


async def test_import_shows_its_progress(start: Open, tmp_path: Path) -> None:
    """On a terminal, the import of a long file shows how far it is, and removes that at the end."""
    rows = (f"{number:064x},n{number},read\n" for number in range(1, 1_002))
    (tmp_path / "keys.csv").write_text("hash,name,scope\n" + "".join(rows))
    terminal = await start("import", "keys.csv")
    await terminal.until("1,002 lines read, 1,000 tokens there")
    assert await terminal.end() == 0
    last = terminal.screen.rpartition("\x1b[K")[2]
    assert last.startswith("imported: 1,001")
    assert "lines read" not in last
