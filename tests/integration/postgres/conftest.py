"""A Postgres on which a test may be superuser, and configure the server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.helpers.postgres_node import Node, Template, lone_node, make_template, new_folder


@pytest.fixture(scope="package")
async def node_template(scratch: Path) -> Template:
    """The cluster that nodes are copied from."""
    return await make_template(new_folder(scratch, "template-"))


@pytest.fixture
async def node(scratch: Path, node_template: Template) -> AsyncIterator[Node]:
    """An empty database of the role `latchkey`, on a running server."""
    async with lone_node(scratch, node_template) as running:
        yield running
