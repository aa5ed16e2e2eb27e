"""A target that is broken, to show that what is broken is found. Not among the others."""

from collections.abc import Iterable

from tests.fuzz.target import Target


class Broken(Target):
    """Has a parser that fails at some bytes within its input."""

    length_max = 16

    def seeds(self) -> Iterable[bytes]:
        yield b"good"

    def one(self, data: bytes) -> None:
        if b"\xff\x00" in data:
            raise LookupError("the parser met what it does not know")


TARGET = Broken
