"""docs/console.md and docs/operators.md: commands start the console, and the theme is accepted."""

import os
import re
import shutil
from pathlib import Path

import pytest
from latchkey_console import cookies, ended, frame, pages, protection, showing
from latchkey_console.appearance import read_theme
from latchkey_console.openid import SIGN_IN_SECONDS
from latchkey_console.state import read_keys

from tests.console.processes import Console, run
from tests.helpers.free_ports import free_port
from tests.helpers.programs import run as execute
from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/console.md").read_text("utf-8")
OPERATORS = (ROOT / "docs/operators.md").read_text("utf-8")
_BLOCK = r"^ *<!-- test: {} -->\n *```\w+\n(.*?)^ *```$"


def block(mark: str, page: str = PAGE) -> str:
    """Return the block of code with this mark, with continued lines joined."""
    (text,) = re.findall(_BLOCK.format(mark), page, re.MULTILINE | re.DOTALL)
    return re.sub(r" *\\\n *", " ", str(text))


def test_every_block_is_tested() -> None:
    """Each marked block has a test here."""
    marks = set(re.findall(r"<!-- test: console (.+) -->", PAGE))
    assert marks == {"state key", "several", "embedded", "framed", "theme"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_commands_for_several_processes(tmp_path: Path) -> None:
    """The documented commands make a key that the console accepts, and start both processes."""
    for line in block("console state key").strip().split("\n"):
        code, said = execute(
            ("sh", "-c", f"cd {tmp_path} && {line.strip()}"), 20.0, dict(os.environ)
        )
        assert code == 0, said
    assert len(read_keys(tmp_path / "console-state.key")) == 1
    ports = {"50080": str(free_port()), "50081": str(free_port())}
    running: list[Console] = []
    try:
        for line in block("console several").strip().split("\n"):
            for documented, port in ports.items():
                line = line.replace(documented, port)  # noqa: PLW2901 - the same line
            name, command, *arguments = line.split()
            assert (name, command) == ("latchkey", "console")
            file = str(tmp_path / "console-state.key")
            arguments = [file if a == "console-state.key" else a for a in arguments]
            running.append(Console(tmp_path / str(len(running)), *arguments))
            assert run(running[-1].url()) == "https://tokens.example.com"
    finally:
        codes = [process.end() for process in running]
    assert codes == [0, 0]


@pytest.mark.parametrize(
    ("mark", "page", "url"),
    [
        ("console embedded", PAGE, "https://app.example.com/settings/tokens"),
        ("console framed", PAGE, "https://tokens.example.com"),
        ("console operators", OPERATORS, "https://latchkey-operators.example.com"),
    ],
)
def test_single_commands(tmp_path: Path, mark: str, page: str, url: str) -> None:
    """Each documented command serves the page at the documented address."""
    name, command, *arguments = block(mark, page).split()
    assert (name, command) == ("latchkey", "console")
    if "--listen" in arguments:
        arguments[arguments.index("--listen") + 1] = f"127.0.0.1:{free_port()}"
    running = Console(tmp_path / "page", *arguments)
    try:
        assert run(running.url()) == url
    finally:
        assert running.end() == 0


def test_documented_theme(tmp_path: Path) -> None:
    """The example is a valid theme."""
    path = tmp_path / "theme.css"
    path.write_text(block("console theme"))
    assert "--blue: #0b6e4f;" in read_theme(path)


def test_documented_figures() -> None:
    """The page names the times and numbers of the code."""
    text = " ".join(PAGE.split())
    for words, value in (
        (f"for at most {ended.PEER_SECONDS:.0f} seconds", ended.PEER_SECONDS),
        (f"every {ended.FETCH_SECONDS:.0f} seconds", ended.FETCH_SECONDS),
        (f"After {SIGN_IN_SECONDS / 3_600:.0f} hours", SIGN_IN_SECONDS),
        (f"the latest {showing.USED_MAX}", showing.USED_MAX),
        (f"{showing.SECRET_SECONDS // 60} minutes, and until the first", showing.SECRET_SECONDS),
        (f"{pages.DRAFT_SECONDS // 60} minutes", pages.DRAFT_SECONDS),
        (f"{protection.FORM_SECONDS // 3_600} hour", protection.FORM_SECONDS),
        (f"{frame.NOTICE_SECONDS // 60} minutes, until it is shown", frame.NOTICE_SECONDS),
    ):
        assert words in text, (words, value)
    # What the page promises about sizes depends on what browsers accept.
    assert cookies.VALUE_LENGTH_MAX < 4_096
