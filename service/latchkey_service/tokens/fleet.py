"""Rules that keep the peppers of all hosts on one database compatible. Pure.

A host that lacks another host's pepper answers UNKNOWN to the tokens created there. `refusal`
rejects a start that would certainly cause this, for `pepper_enrolment.py`. `mismatches` finds hosts
that already differ, for workers and StatusService. This module reads neither file nor database.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["KnownPepper", "Member", "Mismatch", "News", "Reports", "mismatches", "refusal"]

# A warning stays readable in a fleet of any size; `latchkey status` lists every process.
NAMED_MAX = 4
SETTING = "LATCHKEY_PEPPER_FILE"
# A warning that nobody acted on is repeated.
REMINDER_SECONDS = 3_600.0


class KnownPepper(NamedTuple):
    """A pepper that the database knows."""

    id: str
    needed: bool
    """Whether live tokens use it."""
    read: bool
    """Whether a registered verifier has it."""


class Member(Protocol):
    """A verifier's row, as far as peppers are concerned."""

    @property
    def host(self) -> str:
        """Name of the host, as the host reports it."""

    @property
    def process_id(self) -> int:
        """Process id on that host."""

    @property
    def lease_remaining_seconds(self) -> float:
        """Time left on its lease; 0 for a process that no longer answers verifies."""

    @property
    def pepper_ids(self) -> Sequence[str]:
        """Peppers that it reads, the newest first; empty if it does not report them."""


def refusal(
    path: Path, own_ids: Sequence[str], known: Sequence[KnownPepper], *, generated: bool, new: bool
) -> str | None:
    """Return why a host may not start with the peppers `own_ids` of the file `path`, or None.

    `generated`: the file is the one that Latchkey generates, not one that the setting names, and
    other hosts may use the database. `new`: there is no file yet; `own_ids` is a key that would be
    generated.
    """
    own = set(own_ids)
    needed = [pepper.id for pepper in known if pepper.needed and pepper.id not in own]
    if needed and not (generated and new):
        return (
            f"live tokens need peppers that {path} lacks: {', '.join(needed)}. Put them back, or "
            f"point {SETTING} to the file that has them"
        )
    if not generated or not known or own & {pepper.id for pepper in known}:
        return None
    # The copied file need not have old keys that are no longer used.
    used = [pepper.id for pepper in known if pepper.needed or pepper.read]
    expected = ", ".join(used or [pepper.id for pepper in known])
    remedy = (
        f"Copy the pepper file of another host of this database to {path} (mode 0600), or point "
        f"{SETTING} to a copy of it"
    )
    if new:
        return (
            f"there is no pepper file at {path}, and the database expects the peppers {expected}. "
            f"{remedy}. Latchkey generates a key only for a database that knows none"
        )
    return (
        f"the database expects the peppers {expected}, and {path} has only others: "
        f"{', '.join(own_ids)}. {remedy}. To use the present file nevertheless, point {SETTING} "
        "to it"
    )


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A pepper that some live verifiers create tokens with and others lack."""

    pepper_id: str
    minting: tuple[Member, ...]
    lacking: tuple[Member, ...]

    @property
    def hosts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the hosts that create tokens with the pepper, and of those that lack it."""
        return _hosts(self.minting), _hosts(self.lacking)

    def warning(self) -> str:
        """Return one English text that names the fault and its remedy."""
        minting, lacking = (_listed(hosts) for hosts in self.hosts)
        return (
            f"Pepper {self.pepper_id} is missing on {_processes(self.lacking)}, which therefore "
            f"answers UNKNOWN to tokens created on {_processes(self.minting)}. Add the first key "
            f"of the pepper file on {minting} to the pepper file on {lacking}, then restart "
            f"Latchkey on {lacking}."
        )


def mismatches(members: Sequence[Member]) -> list[Mismatch]:
    """Return the peppers that live verifiers create tokens with and that other live ones lack.

    Only the newest pepper of each counts. During a rotation some hosts have a new key below the
    old one while others do not have it yet, and no token uses it. A verifier that does not report
    its peppers is left out, and so is one without a lease: it answers no verifies.
    """
    live = [m for m in members if m.pepper_ids and m.lease_remaining_seconds > 0]
    found = []
    for pepper_id in dict.fromkeys(member.pepper_ids[0] for member in live):
        lacking = tuple(member for member in live if pepper_id not in member.pepper_ids)
        if lacking:
            minting = tuple(member for member in live if member.pepper_ids[0] == pepper_id)
            found.append(Mismatch(pepper_id, minting, lacking))
    return found


class News(NamedTuple):
    """The changes since the last check."""

    found: list[Mismatch]
    """Mismatches to warn about."""
    resolved: bool
    """Whether all earlier mismatches are resolved."""


class Reports:
    """Decides which mismatches to log: each once when it appears, and as a reminder."""

    def __init__(self) -> None:
        self.missing = 0
        """Peppers that a live host lacked at the last check."""
        self._reported: dict[tuple[str, tuple[str, ...], tuple[str, ...]], float] = {}

    def news(self, members: Sequence[Member], now: float) -> News:
        """Return the news at `now`, in seconds of a monotonic clock.

        Processes come and go with each restart, so a mismatch is known by its pepper and hosts.
        """
        found = {(m.pepper_id, *m.hosts): m for m in mismatches(members)}
        self.missing = len({mismatch.pepper_id for mismatch in found.values()})
        resolved = bool(self._reported) and not found
        last = {key: time for key, time in self._reported.items() if key in found}
        due = [key for key in found if key not in last or now - last[key] >= REMINDER_SECONDS]
        self._reported = last | dict.fromkeys(due, now)
        return News([found[key] for key in due], resolved)


def _hosts(members: Sequence[Member]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member.host for member in members))


def _processes(members: Sequence[Member]) -> str:
    """Return the hosts with the process ids on each: several may share a name."""
    texts = []
    for host in _hosts(members):
        ids = [str(member.process_id) for member in members if member.host == host]
        texts.append(f"{host} (process{'' if len(ids) == 1 else 'es'} {_listed(ids)})")
    return _listed(texts)


def _listed(texts: Sequence[str]) -> str:
    """Return "a, b and c", shortened to a few."""
    if len(texts) > NAMED_MAX:
        texts = [*texts[: NAMED_MAX - 1], f"{len(texts) - NAMED_MAX + 1} more"]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
