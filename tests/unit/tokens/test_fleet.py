"""The rules for the peppers of hosts on one database: which starts are rejected, and what counts as
a mismatch."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from latchkey_service.tokens.fleet import (
    REMINDER_SECONDS,
    KnownPepper,
    Reports,
    mismatches,
    refusal,
)

PATH = Path("/data/peppers")


@dataclass(frozen=True)
class Verifier:
    host: str
    pepper_ids: tuple[str, ...]
    process_id: int = 1
    lease_remaining_seconds: float = 2.0


def known(*ids: str, needed: str = "", read: str = "") -> list[KnownPepper]:
    return [KnownPepper(pepper, pepper in needed.split(), pepper in read.split()) for pepper in ids]


def refused(
    own: str, peppers: list[KnownPepper], *, generated: bool = True, new: bool = False
) -> str:
    return refusal(PATH, own.split(), peppers, generated=generated, new=new) or ""


def test_first_host_generates_a_key() -> None:
    """A database that knows no pepper accepts a generated one."""
    assert not refused("new", [], new=True)


@pytest.mark.parametrize("peppers", [known("a"), known("a", needed="a"), known("a", read="a")])
def test_later_host_generates_no_key(peppers: list[KnownPepper]) -> None:
    """A database that knows a pepper rejects a generated one, whether the known one is used or not.
    The reason names the expected id, the file to put in place, and the setting."""
    reason = refused("new", peppers, new=True)
    for part in ("expects the peppers a.", str(PATH), "Copy the pepper file", "LATCHKEY_PEPPER_"):
        assert part in reason
    assert "new" not in reason


def test_only_used_peppers_are_expected() -> None:
    """The reason omits ids that neither a verifier nor a live token uses."""
    peppers = known("old", "mine", "theirs", needed="mine", read="theirs")
    assert "expects the peppers mine, theirs." in refused("new", peppers, new=True)
    assert "expects the peppers old, older." in refused("new", known("old", "older"), new=True)


def test_generated_file_of_another_database_is_rejected() -> None:
    """A generated file is rejected if the database knows none of its keys, unless the setting names
    the file."""
    reason = refused("mine", known("theirs"))
    assert "expects the peppers theirs, and /data/peppers has only others: mine" in reason
    assert "To use the present file nevertheless, point LATCHKEY_PEPPER_FILE to it" in reason
    assert not refused("mine", known("theirs"), generated=False)


def test_a_file_that_shares_a_pepper_is_accepted() -> None:
    """The first step of a rotation adds a key that the database does not know yet."""
    assert not refused("old new", known("old", read="old"))
    assert not refused("new old", known("older", "old", needed="old"))


@pytest.mark.parametrize("generated", [True, False])
def test_live_tokens_need_their_peppers(*, generated: bool) -> None:
    """A file that lacks a pepper of live tokens is rejected, even if the setting names it."""
    reason = refused("new", known("old", "new", needed="old"), generated=generated)
    assert "live tokens need peppers that /data/peppers lacks: old" in reason


def test_a_lost_file_of_a_lone_host() -> None:
    """A host with the embedded database generates a new key, but not while live tokens need the old
    one."""
    assert not refused("new", known("old"), generated=False, new=True)
    reason = refused("new", known("old", needed="old"), generated=False, new=True)
    assert "lacks: old" in reason


@pytest.mark.parametrize(
    "fleet",
    [
        [],
        [Verifier("a", ("old",)), Verifier("b", ("old",))],
        # docs/settings.md, Peppers, step 1: append the key, one host after the other.
        [Verifier("a", ("old", "new")), Verifier("b", ("old",))],
        [Verifier("a", ("old", "new")), Verifier("b", ("old", "new"))],
        # Step 2: move it to the top, one host after the other.
        [Verifier("a", ("new", "old")), Verifier("b", ("old", "new"))],
        [Verifier("a", ("new", "old")), Verifier("b", ("new", "old"))],
        # Step 3: remove the old key.
        [Verifier("a", ("new",)), Verifier("b", ("new", "old"))],
        [Verifier("a", ("new",)), Verifier("b", ("new",))],
    ],
)
def test_a_documented_rotation_is_not_a_mismatch(fleet: list[Verifier]) -> None:
    """No state of the documented rotation is a mismatch, and neither is an empty fleet."""
    assert mismatches(fleet) == []


def test_a_hasty_rotation_is_a_mismatch() -> None:
    """If one host uses a new key before the others have it, the mismatch names the hosts on both
    sides."""
    hasty, late = Verifier("a", ("new", "old"), 7), Verifier("b", ("old",), 8)
    (found,) = mismatches([hasty, late])
    assert (found.pepper_id, found.minting, found.lacking) == ("new", (hasty,), (late,))
    assert found.hosts == (("a",), ("b",))
    assert found.warning() == (
        "Pepper new is missing on b (process 8), which therefore answers UNKNOWN to tokens created "
        "on a (process 7). Add the first key of the pepper file on a to the pepper file on b, then "
        "restart Latchkey on b."
    )


def test_removing_an_old_key_too_early_is_a_mismatch() -> None:
    """A host that drops the old key while another still creates tokens with it is named."""
    (found,) = mismatches([Verifier("a", ("new",)), Verifier("b", ("old", "new"))])
    assert (found.pepper_id, found.hosts) == ("old", (("b",), ("a",)))


def test_separate_keys_are_two_mismatches() -> None:
    """Hosts that have nothing in common each lack the other's pepper."""
    found = mismatches([Verifier("a", ("x",)), Verifier("b", ("y",)), Verifier("b", ("y",), 2)])
    assert [(m.pepper_id, m.hosts) for m in found] == [
        ("x", (("a",), ("b",))),
        ("y", (("b",), ("a",))),
    ]
    assert "b (processes 1 and 2)" in found[0].warning()


@pytest.mark.parametrize(
    "other",
    [
        # The rows of killed processes remain for a moment.
        Verifier("b", ("y",), lease_remaining_seconds=0.0),
        # A release that does not report its peppers, during an upgrade.
        Verifier("b", ()),
    ],
)
def test_dead_and_silent_verifiers_are_ignored(other: Verifier) -> None:
    """A verifier that answers nothing, or does not report its peppers, causes no mismatch."""
    assert mismatches([Verifier("a", ("x",)), other]) == []
    assert mismatches([other, Verifier("a", ("x",))]) == []


def test_warnings_stay_short() -> None:
    """A warning names a few hosts and processes and counts the others."""
    many = [Verifier("b", ("y",), number) for number in range(1, 100)]
    crowd = [Verifier(f"c{number}", ("y",)) for number in range(1, 100)]
    lacking, *_ = mismatches([Verifier("a", ("x",)), *many, *crowd])
    warning = lacking.warning()
    assert (
        "b (processes 1, 2, 3 and 96 more), c1 (process 1), c2 (process 1) and 97 more" in warning
    )
    assert "to the pepper file on b, c1, c2 and 97 more" in warning
    assert len(warning) < 400


def test_each_mismatch_is_reported_once_and_as_a_reminder() -> None:
    """A mismatch is logged when it appears, again after an hour, and when it reappears. Other
    processes on the same hosts do not repeat the warning; other hosts do."""
    reports, a, b = Reports(), Verifier("a", ("x",)), Verifier("b", ("y", "x"))
    assert [m.pepper_id for m in reports.news([a, b], 0).found] == ["y"]
    assert reports.news([a, Verifier("b", ("y", "x"), 2)], 10) == ([], False)
    (grown,) = reports.news([a, Verifier("c", ("x",)), b], 20).found
    assert grown.hosts == (("b",), ("a", "c"))
    assert len(reports.news([a, Verifier("c", ("x",)), b], 20 + REMINDER_SECONDS).found) == 1
    assert reports.news([a], 21 + REMINDER_SECONDS) == ([], True)
    assert reports.news([a], 22 + REMINDER_SECONDS) == ([], False)
    assert len(reports.news([a, b], 23 + REMINDER_SECONDS).found) == 1
