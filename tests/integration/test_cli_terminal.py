"""The command line tool as a person uses it: on a terminal, with prompts."""

import asyncio
import os
import pty
import re
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

TIMEOUT_SECONDS = 20
# Makes the pseudo-terminal the controlling one, which getpass opens and Ctrl-C comes from.
START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from latchkey_cli.main import main
sys.exit(main())
"""


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
        except OSError:  # EIO: the last process on it is gone
            data = b""
        if not data:
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self.screen += data.decode()
        self._changed.set()

    async def until(self, text: str) -> None:
        """Wait until `text` is on the screen."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while text not in self.screen:
                assert not self._ended, self.screen
                self._changed.clear()
                await self._changed.wait()

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def end(self) -> int:
        """Wait for the end, and return the exit code."""
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
def transport() -> str:
    """What the tool sees is the same over both transports; one is enough here."""
    return "native"


@pytest.fixture
async def start(address: str, tmp_path: Path) -> AsyncIterator[Open]:
    """Start the tool with arguments on a terminal."""
    terminals: list[Terminal] = []

    async def start(*arguments: str, **environment: str) -> Terminal:
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", START, *arguments),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
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


async def test_the_secret_is_prompted_for_and_not_shown(start: Open, create: Create) -> None:
    """On a terminal the secret is typed blind, and is nowhere on the screen."""
    secret = (await create()).secret
    terminal = await start("verify", "--scope", "read")
    await terminal.until("Secret (not shown): ")
    terminal.type(secret + "\n")
    assert await terminal.end() == 0
    assert "VALID" in terminal.screen
    assert secret not in terminal.screen


async def test_ctrl_c_at_a_prompt_is_130_and_quiet(start: Open, create: Create) -> None:
    """The first Ctrl-C ends a prompt, with nothing done and no traceback."""
    token = (await create(name="deploy bot")).token
    prompts = {"verify": "Secret (not shown): ", f"delete {token.id}": "[y/N] "}
    for command, prompt in prompts.items():
        terminal = await start(*command.split())
        await terminal.until(prompt)
        terminal.type("\x03")
        assert await terminal.end() == 130
        assert "Traceback" not in terminal.screen
        assert "Deleted" not in terminal.screen


async def test_delete_asks_and_takes_no_for_an_answer(start: Open, create: Create) -> None:
    """Each deletion names what dies; only yes deletes, and no is an exit code of its own."""
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

    # Deleted already: there is nothing to lose, so its receipt comes without a question.
    terminal = await start("delete", second.id)
    assert await terminal.end() == 0
    assert "[y/N]" not in terminal.screen


async def test_invalidate_all_asks_and_takes_no_for_an_answer(
    start: Open, stub: Any, create: Create
) -> None:
    """On a terminal, only yes empties the memories; no and Ctrl-C take no revision, and have exit
    codes of their own."""
    secret = (await create()).secret

    async def revision() -> int:
        created = await create()
        request = pb.DeleteRequest(account_id="acme", id=created.token.id)
        return (await stub.Delete(request)).receipt.revision

    for typed, code in (("n\n", 1), ("\n", 1), ("\x03", 130), ("y\n", 0)):
        before = await revision()
        terminal = await start("invalidate-all")
        await terminal.until("Empty the memory of every verifier? [y/N]")
        terminal.type(typed)
        assert await terminal.end() == code
        assert ("Emptied" in terminal.screen) is (code == 0)
        assert await revision() == before + 1 + (code == 0)
    assert (await stub.Verify(pb.VerifyRequest(secret=secret))).verdict == pb.VERDICT_VALID


async def test_create_shows_token_and_secret_once(start: Open) -> None:
    """A person sees the token, the secret in one piece, and that it is never shown again."""
    terminal = await start("create", "[red]deploy[/red]", "--scope", "write", "--expires", "30d")
    assert await terminal.end() == 0
    assert "[red]deploy[/red]" in terminal.screen
    assert len(re.findall(r"^lk_[0-9A-Za-z]{57}\r$", terminal.screen, re.MULTILINE)) == 1
    assert "shown once" in terminal.screen
    assert "(in 30 days)" in terminal.screen


async def test_no_color_is_honoured(start: Open, create: Create) -> None:
    """With NO_COLOR there is no colour on the terminal, and without it there is."""
    await create(scope=pb.SCOPE_WRITE)
    colour = re.compile(r"\x1b\[(\d+;)*(3[0-7]|9[0-7]|38;[0-9;]+)m")
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = await start("list", **environment)
        assert await terminal.end() == 0
        assert "Expires" in terminal.screen
        assert bool(colour.search(terminal.screen)) is coloured


async def test_ids_can_be_copied_at_any_width(start: Open, create: Create) -> None:
    """The ID of a token is in one piece in the list and in the audit log, and nothing is left out,
    on terminals of 80 columns and on wide ones."""
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
