"""The interface of the fuzzer's targets, and the table of all targets."""

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
    """A guarantee does not hold. Any other exception from a target is a finding, too."""


class Target(ABC):
    """One thing to attack. Created once per process; `one` is then called for each input."""

    length_max = 4_096
    """Longest input, bytes."""
    mutates = False
    """Whether `mutate` knows the inputs' structure better than libFuzzer."""

    @abstractmethod
    def seeds(self) -> Iterable[bytes]:
        """Return valid inputs to start from."""

    @abstractmethod
    def one(self, data: bytes) -> None:
        """Attack with one input. Raises any finding. The same input has the same effect."""

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        """Return a mutated input of at most the given length."""
        raise NotImplementedError

    def processes(self) -> list[psutil.Process]:
        """Return the processes whose memory and files must not grow."""
        return [psutil.Process(os.getpid())]

    def settle(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait until the effects of the last inputs are gone; then the processes are measured."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A target's module, the environment that it needs (`surroundings.py`), and what it attacks."""

    module: str
    needs: str
    about: str
    arguments: tuple[Any, ...] = ()


TARGETS = {
    "secrets": Entry(
        "secret_text", "nothing", "parsers of secrets in server and client, and redaction"
    ),
    "page-tokens": Entry("page_tokens", "nothing", "page tokens of tokens and of the audit log"),
    "policy": Entry("policy_file", "nothing", "policy file: a Policy, or an error with its line"),
    "headers": Entry("headers", "nothing", "authorization and x-forwarded-client-cert"),
    "non-utf8": Entry("non_utf8_verify", "nothing", "Verifies whose secret is not text"),
    "messages-native": Entry("messages", "postgres", "every method's message", ("native",)),
    "messages-grpcio": Entry("messages", "postgres", "every method's message", ("grpcio",)),
    "http2-native": Entry("http2", "native", "frames, floods and rapid resets", (False,)),
    "http2-grpcio": Entry("http2", "grpcio", "frames, floods and rapid resets", (False,)),
    "http2-tls": Entry("http2", "tls", "TLS records, and frames within", (True,)),
    "seals": Entry("sealed_rows", "nothing", "sealed rows that were changed"),
    "refused-native": Entry(
        "refused_calls", "native-policy", "calls without a credential", (False,)
    ),
    "refused-tls": Entry("refused_calls", "tls-policy", "calls without a credential", (True,)),
}
# Excluded from the table: it only shows that the fuzzer finds bugs.
BROKEN = {"broken": Entry("broken", "nothing", "raises at some bytes", ())}


def load(name: str) -> Target:
    """Import and create a target."""
    entry = (TARGETS | BROKEN)[name]
    target: Target = import_module(f"tests.fuzz.{entry.module}").TARGET(*entry.arguments)
    return target
