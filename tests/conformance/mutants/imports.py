"""Faults in what a client calls malformed by itself."""

from __future__ import annotations

from dataclasses import replace

from latchkey import _shape, verifier
from latchkey._subscription import Grant, Stream

from tests.conformance.mutants.base import Patch, mutant, on_grant


@mutant(6, "before-the-first-grant")
def refuses_what_it_does_not_know(patch: Patch) -> None:
    patch.setattr(verifier, "may_be_secret", lambda text, _: _shape.is_well_formed(text))


@mutant(6, "a-grant-without-prefixes")
def asks_about_everything(patch: Patch) -> None:
    patch.setattr(verifier, "may_be_secret", lambda text, _: _shape.may_be_secret(text, None))


@mutant(6, "prefixes-of-the-last-grant")
def ignores_the_prefixes(patch: Patch) -> None:
    def change(_stream: Stream, grant: Grant, _now: float) -> Grant:
        return replace(grant, imported_prefixes=())

    on_grant(patch, change)


@mutant(6, "prefixes-of-the-last-grant")
def believes_each_grant(patch: Patch) -> None:
    receive_grant = Stream._receive_grant

    def mutated(self: Stream, grant: Grant, now: float) -> None:
        receive_grant(self, grant, now)
        self._subscription.imported_prefixes = grant.imported_prefixes

    patch.setattr(Stream, "_receive_grant", mutated)
