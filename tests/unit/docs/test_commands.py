"""A test runs every block of commands in the documents, or a list here says why none does."""

import re

import pytest

from tests.helpers.documented import DOCUMENTS, Block, blocks
from tests.helpers.repository import ROOT

# Blocks in these languages hold commands. The output of `console` is compared too.
SHELLS = {"bash", "console", "sh", "shell", "shell-session", "zsh"}
# The modules with the tests of each page's commands, each with the marks that it knows.
QUICKSTARTS = (
    "tests/integration/docs/test_quickstarts.py",
    {"run", "install", "npm", "go install"},
)
README = "tests/integration/docs/test_readme_grpcurl.py"
RUN: dict[str, list[tuple[str, set[str]]]] = {
    "README.md": [
        (
            README,
            {"make run", "cli", "guard server", "guard calls", "grpcurl install", "grpcurl"},
        ),
        ("tests/console/test_running.py", {"make console", "console"}),
        ("tests/integration/access/test_callers_process.py", {"policy"}),
    ],
    "clients/python/README.md": [("tests/unit/docs/test_docs.py", {"wheel"})],
    "docs/backup.md": [
        ("tests/integration/postgres/test_documented_commands.py", {"lost deletions"})
    ],
    "docs/callers.md": [
        ("tests/integration/postgres/test_documented_commands.py", {"audit verify"})
    ],
    "docs/certificates.md": [
        (
            "tests/integration/docs/test_certificates_page.py",
            {"certificates", "certificates in use"},
        )
    ],
    "docs/console.md": [
        (
            "tests/console/test_console_page.py",
            {"console state key", "console several", "console embedded", "console framed"},
        )
    ],
    "docs/deploy.md": [
        ("tests/integration/process/test_docker_files.py", {"image behind a mirror"})
    ],
    "docs/import.md": [("tests/integration/docs/test_import_page.py", {"import"})],
    "docs/leaks.md": [("tests/integration/docs/test_leaks_page.py", {"leaks", "receiver"})],
    "docs/migrations.md": [("tests/integration/postgres/test_documented_commands.py", {"migrate"})],
    "docs/operators.md": [("tests/console/test_console_page.py", {"console operators"})],
    "docs/postgres.md": [("tests/integration/postgres/test_documented_commands.py", {"two roles"})],
    "docs/settings.md": [(README, {"config"})],
    "docs/tokens.md": [("tests/integration/docs/test_tokens_page.py", {"token life"})],
    "docs/tracing.md": [("tests/integration/docs/test_tracing_page.py", {"traces"})],
    "docs/webhook.md": [("tests/integration/docs/test_webhook_page.py", {"webhook"})],
    "examples/README.md": [("tests/integration/examples/test_commands.py", {"example token"})],
}
# The page and the first words of each block that no test runs, with the reason.
NOT_RUN = {
    (
        "docs/deploy.md",
        "helm upgrade",
    ): "needs a Kubernetes cluster; the tests in integration/deploy render the chart",
    (
        "docs/deploy.md",
        "docker buildx imagetools",
    ): "asks a registry of images; test_docker_files.py compares the name with the Dockerfile",
    (
        "docs/failover.md",
        "apt install etcd-server",
    ): "installs packages of the system, and runs for ten minutes",
    (
        "docs/import.md",
        "mysql --batch",
    ): "needs Unkey's database on MySQL; test_import_page.py imports what it writes",
    (
        "docs/tracing.md",
        "docker run",
    ): "needs containers and a registry; test_tracing_page.py has its own collector",
}


def reason(block: Block) -> str | None:
    """Return why no test runs a block, or None if one has to."""
    for (page, words), why in NOT_RUN.items():
        if block.page == page and block.text.startswith(words):
            return why
    return None


def modules_of(block: Block) -> list[str]:
    """Return the modules whose tests run a block."""
    if block.page.startswith("docs/quickstart/"):
        module, marks = QUICKSTARTS
        return [module] if block.mark in marks or block.mark.startswith("serve ") else []
    return [module for module, marks in RUN.get(block.page, []) if block.mark in marks]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_block_of_commands_is_run(page: str) -> None:
    """Each block of commands has a test, or a reason why it has none."""
    for block in blocks(page):
        if block.language in SHELLS:
            assert bool(modules_of(block)) != bool(reason(block)), block


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_block_names_its_language(page: str) -> None:
    """No block of commands hides as one without a language, or as text."""
    program = re.compile(r"^(?:\$ |sudo |curl |docker |grpcurl |latchkey |make |\.venv/bin/)")
    for block in blocks(page):
        assert block.language, block
        if block.language in {"text", "ini"}:
            assert not any(program.match(line) for line in block.text.splitlines()), block


def test_the_lists_are_true() -> None:
    """The named modules exist and read the page, each mark is in the page and in the module, and
    each reason belongs to a block."""
    for page, modules in RUN.items():
        marks = {block.mark for block in blocks(page)}
        for module, known in modules:
            assert known <= marks, (page, known - marks)
            text = (ROOT / module).read_text("utf-8")
            assert page in text or (module == README and "docs/settings.md" in text), (page, module)
            for mark in known:
                # Most modules have the pattern of a family of marks: its first word.
                assert mark in text or mark.partition(" ")[2] in text, (module, mark)
    for page, words in NOT_RUN:
        assert [b for b in blocks(page) if b.text.startswith(words)], (page, words)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nlatchkey list\n```\n",
        "1. In a list:\n\n   ```bash\n   latchkey list\n   ```\n",
        "<!-- test: unknown -->\n```sh\nlatchkey list\n```\n",
        "```console\n$ latchkey list\n```\n",
    ],
)
def test_a_block_that_nothing_runs_is_found(text: str) -> None:
    """A new block of commands, even one in a list or with an unknown mark, has no test yet."""
    (block,) = blocks("docs/tracing.md", text)
    assert block.language in SHELLS
    assert "latchkey list\n" in block.text
    assert modules_of(block) == []
    assert reason(block) is None
