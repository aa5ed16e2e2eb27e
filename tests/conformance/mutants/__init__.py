"""Faults in a client's core, each of which breaks one rule, and the cases that find them."""

from tests.conformance.mutants import confirmations, grants, positions, verdicts
from tests.conformance.mutants.base import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "confirmations", "grants", "positions", "verdicts"]
