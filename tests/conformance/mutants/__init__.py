"""Faults in the client's core. Each breaks one rule and must be found by the cases."""

from tests.conformance.mutants import (
    confirmations,
    grants,
    imports,
    positions,
    rates,
    uses,
    verdicts,
)
from tests.conformance.mutants.base import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "confirmations",
    "grants",
    "imports",
    "positions",
    "rates",
    "uses",
    "verdicts",
]
