"""Processes that use the client library, some of which are killed."""

import collections
import json
import random

from tests.helpers.callers import credential
from tests.helpers.child_processes import Child
from tests.soak.connections import Place

__all__ = ["ClientProcesses"]

CLIENTS = 2


class ClientProcesses:
    """Starts processes of the client library and records what they report."""

    def __init__(self, place: Place, chance: random.Random) -> None:
        self._place = place
        self._random = chance
        self._numbers = iter(range(10**9))
        self._children: list[Child] = []
        self.wrong: collections.Counter[str] = collections.Counter()
        self.unexpected: collections.Counter[str] = collections.Counter()

    async def end(self) -> None:
        """End all processes in order."""
        for client in self._children:
            client.ask_to_end()
        for client in self._children:
            try:
                await client.ended()
            except AssertionError as error:
                self.unexpected[str(error)] += 1
                client.clean_up()
            self._record(client)

    def clean_up(self) -> None:
        for client in self._children:
            client.clean_up()

    async def replace_one(self) -> None:
        """End one process, with a shutdown or a kill, if enough of them run. Start another one."""
        if len(self._children) >= CLIENTS:
            client = self._children.pop(0)
            try:
                if self._random.random() < 0.5:
                    client.kill()
                else:
                    client.ask_to_end()
                await client.ended()
                self._record(client)
            finally:
                client.clean_up()
        options = {
            "target": self._place.address,
            "live": str(self._place.folder / "live"),
            "board": str(self._place.folder / "board"),
        }
        name = f"client-{next(self._numbers)}"
        environment = {"LATCHKEY_CREDENTIAL": credential("verifier")}
        argv = ["tests.soak.client", json.dumps(options)]
        self._children.append(Child(self._place.folder, name, argv, environment))

    def _record(self, client: Child) -> None:
        """Record the output of a client that has ended."""
        if trouble := client.trouble():
            self.unexpected[trouble] += 1
        for line in client.err.read_text("utf-8", "replace").splitlines():
            kind = self.wrong if line.startswith("wrong: ") else self.unexpected
            kind[line] += 1
        client.out.unlink()
        client.err.unlink()
