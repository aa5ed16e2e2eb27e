"""The report of a run, and the conditions under which it fails. Pure."""

from collections import Counter
from collections.abc import Sequence

from tests.history.checker import Findings, Late
from tests.history.records import ENDS, Kind
from tests.history.records import Outcome as Ended
from tests.history.run import Outcome

__all__ = ["complaints", "late_accepts", "scenarios", "table", "violations"]

# Minimum counts of a run, per second and verifier or deleter: at most a tenth of those on two busy
# cores. A run that was starved, or whose parts did not interact, proves nothing.
ANSWERS_EACH = 3.0
HITS_EACH = 1.0
DELETES_EACH = 0.06
# Minimum shares of the planned faults and of their kinds. Some faults find no target.
FAULTS_SHARE = 0.5
# Minimum shares: of confirmed Deletes that an answered verify followed, and of verifiers that
# answered from their caches.
CHECKED_SHARE = 0.5
REMEMBERING_SHARE = 0.5
# Minimum share of imported tokens, a quarter of what is imported.
IMPORTED_SHARE = 0.05
LATE_SHOWN = 20


def complaints(outcome: Outcome) -> list[str]:
    """Return the reasons why a run has failed; empty if it has not."""
    size, findings = outcome.size, outcome.findings
    found = violations(findings) + outcome.troubles
    least = {
        "answered verifies": (_verifies(findings), ANSWERS_EACH * size.seconds * size.verifiers),
        "answers from caches": (_hits(findings), HITS_EACH * size.seconds * size.verifiers),
        "confirmed deletes": (len(findings.deleted), DELETES_EACH * size.seconds * size.deleters),
        "deletes that verifies followed": (
            len(findings.checked),
            CHECKED_SHARE * len(findings.deleted),
        ),
        "imported tokens that verifies followed after their Delete": (
            len(findings.checked & findings.imported),
            max(1, IMPORTED_SHARE * len(findings.deleted)),
        ),
        "verifiers that answered from their caches": (
            outcome.remembering,
            REMEMBERING_SHARE * size.verifiers,
        ),
        "faults": (
            len(outcome.faults),
            max(size.faults_min, FAULTS_SHARE * len(outcome.planned)),
        ),
        "kinds of faults": (
            len({fault.kind for fault in outcome.faults}),
            max(size.faults_min, FAULTS_SHARE * len({fault.kind for fault in outcome.planned})),
        ),
    }
    for what, (count, wanted) in least.items():
        if count < wanted:
            found.append(f"too few {what} to tell: {count}, not {wanted:.0f}")
    return found


def violations(findings: Findings) -> list[str]:
    """Return the violations of the guarantees."""
    found = late_accepts(findings) + lost_tokens(findings)
    if findings.refused_early:
        found.append(f"{findings.refused_early} rejections of tokens before any Delete")
    return found


def late_accepts(findings: Findings) -> list[str]:
    """Return a line for each of the first late accepts."""

    def kind(late: Late) -> str:
        return findings.ended_by.get(late.token, Kind.DELETE).name

    lines = [
        f"token {late.token} VALID for {late.who} ({late.kind.name}), in a verify that began"
        f" {late.late_ns / 1e6:.3f} ms after {kind(late)} had answered,"
        f" at {late.began}, and ended at {late.ended}"
        for late in findings.late[:LATE_SHOWN]
    ]
    if findings.late_count > len(lines):
        lines.append(f"and {findings.late_count - len(lines)} more late accepts")
    return lines


def lost_tokens(findings: Findings) -> list[str]:
    """Return a line for each of the first tokens that were reported as not existing."""
    lines = [
        f"token {lost.record.token} NOT_FOUND for {lost.who} ({Kind(lost.record.kind).name}),"
        f" in a call from {lost.record.began} to {lost.record.ended}, though it was created and"
        " not deleted"
        for lost in findings.lost[:LATE_SHOWN]
    ]
    if findings.lost_count > len(lines):
        lines.append(f"and {findings.lost_count - len(lines)} more such answers")
    return lines


def scenarios(findings: Findings, count: int) -> list[str]:
    """Return the results of the scenarios."""
    seen = f"{findings.operations} operations, {len(findings.deleted)} deletes confirmed"
    return [f"scenarios        {count:>10}    {seen}, {findings.late_count} late accepts"]


def table(outcome: Outcome) -> list[str]:
    """Return the results of a run as a readable table."""
    size, findings = outcome.size, outcome.findings
    hosts = ", ".join("1" if workers is None else f"{workers} sharing" for workers in size.hosts)
    faults = Counter(fault.kind for fault in outcome.faults)
    failed = sum(n for (_, ended), n in findings.calls.items() if ended is Ended.FAILED)
    unconfirmed = sum(findings.ended(kind, Ended.FAILED) for kind in ENDS)
    caching = f"{outcome.remembering} of {size.verifiers}"
    no_wait = sum(findings.ended(kind, Ended.COMMITTED) for kind in ENDS)
    run = f"{size.seconds:.0f} s, seed {size.seed}, leases of {size.lease_seconds:g} s"
    who = f"{size.workers} workers ({hosts}), {size.clients} clients, {size.deleters} deleters"
    planned = f"of {len(outcome.planned)} planned" if outcome.planned else "one after another"
    others = f"{no_wait} not waited for, {unconfirmed} failed and tried again"
    return [
        f"{run}, {who}",
        f"operations       {findings.operations:>10,}    and {failed:,} without an answer",
        f"  from caches    {_hits(findings):>10,}    by {caching} verifiers",
        f"  from service   {findings.from_service:>10,}    asked by verifiers",
        f"  direct         {findings.count(Kind.DIRECT):>10,}    Verify RPCs right after Deletes",
        f"  creates        {findings.ended(Kind.CREATE, Ended.DONE):>10,}",
        f"  imports        {findings.ended(Kind.IMPORT, Ended.DONE):>10,}",
        f"  ends           {len(findings.deletes):>10,}    confirmed; {others}",
        *(
            f"    {kind.name.lower():<20} {count:>5,}"
            for kind, count in sorted(Counter(findings.ended_by.values()).items())
        ),
        f"    of tokens    {len(findings.deleted):>10,}",
        f"    checked      {len(findings.checked):>10,}    verified after their Delete",
        f"faults           {len(outcome.faults):>10,}    {planned}",
        *(f"  {kind:<20} {count:>5}" for kind, count in sorted(faults.items())),
        f"Delete, ms       {'calls':>10} {'p50':>8} {'p90':>8} {'p99':>8} {'max':>8}",
        _delays("  healthy", outcome.healthy),
        _delays("  near a fault", outcome.faulty),
        *(f"strange          {n:>10,}    {text}" for text, n in outcome.strange.most_common(10)),
        f"early rejections {findings.refused_early:>10,}",
        f"late accepts     {findings.late_count:>10,}",
        f"lost tokens      {findings.lost_count:>10,}",
        *outages(outcome),
    ]


def outages(outcome: Outcome) -> list[str]:
    """Return the longest times without answers around each failover."""
    if not outcome.outages:
        return []
    heading = f"{'without answers, s':<50} {'verifies':>9} {'one alone':>9} {'changes':>9}"
    return [
        heading,
        *(
            f"  {each.name:<48} {each.verifies:>9.2f} {each.verifies_worst:>9.2f}"
            f" {each.changes:>9.2f}"
            for each in outcome.outages
        ),
    ]


def _hits(findings: Findings) -> int:
    return sum(findings.from_memory.values())


def _verifies(findings: Findings) -> int:
    answered = (Ended.VALID, Ended.REFUSED)
    return sum(n for (_, ended), n in findings.calls.items() if ended in answered)


def _delays(title: str, delays: Sequence[float]) -> str:
    if not delays:
        return f"{title:<16} {0:>10}"
    shares = (0.5, 0.9, 0.99, 1.0)
    values = (delays[min(len(delays) - 1, int(len(delays) * share))] for share in shares)
    return f"{title:<16} {len(delays):>10} " + " ".join(f"{value:>8.1f}" for value in values)
