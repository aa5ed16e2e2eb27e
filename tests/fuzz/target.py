"""What a target of the fuzzer is, and the table of them all."""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import psutil

__all__ = ["TARGETS", "Finding", "Target", "load"]


class Finding(AssertionError):
    """What was promised does not hold. Any other exception that leaves a target is one, too."""


class Target(ABC):
    """One thing to attack. Made once in a process; `one` is then called for each input."""

    length_max = 4_096
    """Longest input, bytes."""
    mutates = False
    """Whether `mutate` knows more of the inputs than libFuzzer."""

    @abstractmethod
    def seeds(self) -> Iterable[bytes]:
        """Return good inputs to begin from."""

    @abstractmethod
    def one(self, data: bytes) -> None:
        """Attack with one input. Raises what was found. The same input has the same effect."""

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        """Return a changed input, no longer than told."""
        raise NotImplementedError

    def processes(self) -> list[psutil.Process]:
        """Return those whose memory and files must not grow."""
        return [psutil.Process(os.getpid())]

    def settle(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait until what is left of the last inputs is gone; then the processes are looked at."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a target is, what it needs to run (`surroundings.py`), and what it attacks."""

    module: str
    needs: str
    about: str
    arguments: tuple[Any, ...] = ()


TARGETS = {
    "secrets": Entry(
        "secret_text", "nothing", "parser of secrets, the client's too, and redaction"
    ),
    "page-tokens": Entry("page_tokens", "nothing", "page tokens of tokens and of the audit log"),
    "policy": Entry("policy_file", "nothing", "policy file: a Policy, or an error with its line"),
    "headers": Entry("headers", "nothing", "authorization and x-forwarded-client-cert"),
    "lenient": Entry("lenient_verify", "nothing", "Verifies whose secret is not text"),
    "messages-native": Entry("messages", "postgres", "every method's message", ("native",)),
    "messages-grpcio": Entry("messages", "postgres", "every method's message", ("grpcio",)),
    "http2-native": Entry("http2", "native", "frames, floods and rapid resets", (False,)),
    "http2-grpcio": Entry("http2", "grpcio", "frames, floods and rapid resets", (False,)),
    "http2-tls": Entry("http2", "tls", "TLS records, and frames within", (True,)),
}
# Not among the others: there to show that what is broken is found.
BROKEN = {"broken": Entry("broken", "nothing", "raises at some bytes", ())}


def load(name: str) -> Target:
    """Import and make a target."""
    entry = (TARGETS | BROKEN)[name]
    target: Target = import_module(f"tests.fuzz.{entry.module}").TARGET(*entry.arguments)
    return target
