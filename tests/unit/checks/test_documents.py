"""The check of the types in documents finds a fault in a block."""

from pathlib import Path

from tests.checks import documents
from tests.checks.steps import State
from tests.helpers.repository import ROOT


def test_blocks_of_the_documents() -> None:
    """The README's and the quickstarts' programs are among the blocks, each under its own name."""
    names = [name for name, _ in documents.blocks(ROOT)]
    assert len(names) == len(set(names)) > 15
    assert "docs_quickstart_fastapi/orders.py" in names
    code = "".join(code for name, code in documents.blocks(ROOT) if name.startswith("readme/"))
    assert "current_token().account_id" in code


def test_wrong_type(tmp_path: Path) -> None:
    """A block with a wrong type, or without annotations, fails the check."""
    page = tmp_path / "README.md"
    page.write_text("```python\nimport os\n\n\ndef pid() -> str:\n    return os.getpid()\n```\n")
    outcome = documents.check(tmp_path)
    assert outcome.state is State.FAILED
    assert 'expected "str"' in outcome.text
    page.write_text("```python\nimport os\n\n\ndef pid():\n    return os.getpid()\n```\n")
    assert "missing a return type" in documents.check(tmp_path).text
