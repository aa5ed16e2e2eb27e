"""What the tests of listeners share."""

from pathlib import Path

import pytest

from tests.integration.transport.listener import Serve, serving


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Run listeners: one of LISTENERS, with these limits."""
    return serving(tmp_path)
