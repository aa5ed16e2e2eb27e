"""Each worker imports all test modules, and begins where no other does."""

from pathlib import Path

from tests.helpers.shared_compilation import in_turn

ALL = [Path(f"test_{number}.py") for number in range(10)]


def test_workers_begin_at_different_parts() -> None:
    """In an equal number of steps, the workers have imported every module once together."""
    orders = [in_turn(ALL, number, 4) for number in range(4)]
    assert [order[0].name for order in orders] == [f"test_{n}.py" for n in (0, 2, 5, 7)]
    assert all(sorted(order) == ALL for order in orders)
    assert {path for order in orders for path in order[:3]} == set(ALL)
