"""What the tests of transports share."""

from collections.abc import Sequence
from typing import Any

import pygrpc_native.aio
import pytest
from pygrpc_native import EVENT_CANCEL

from tests.unit.transport.fronts import Server


@pytest.fixture
def server(unstarted: None) -> Server:
    """A server without a policy."""
    return Server()


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers record the calls that they start."""

    def begin(server: Server, events: Sequence[Any]) -> None:
        for event in events:
            done = server.cancelled if event[0] == EVENT_CANCEL else server.started
            done.append(event[1])

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", begin)
