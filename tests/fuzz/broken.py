"""A broken target, to show that the fuzzer finds bugs. It is not in the table of targets."""

from collections.abc import Iterable

from tests.fuzz.target import Target


class Broken(Target):
    """A parser that fails at certain bytes in its input."""

    length_max = 16

    def seeds(self) -> Iterable[bytes]:
        yield b"good"

    def one(self, data: bytes) -> None:
        if b"\xff\x00" in data:
            raise LookupError("the parser met what it does not know")


TARGET = Broken
