"""How callers share the slots of a role, and what goes before everything else."""

import asyncio
import random
from typing import Any

import pytest
from google.protobuf import duration_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import ROTATE, UPDATE
from latchkey_service.access.policy import parse
from latchkey_service.access.rates import RateLimits
from latchkey_service.errors import LatchkeyError, Overloaded, RateLimited
from latchkey_service.rpc.admission import BURST, ConcurrencyLimiter
from latchkey_service.rpc.removals import may_narrow

from tests.helpers.callers import policy_text

SECONDS = 10.0


class Scene:
    """A limiter with two slots, and its calls: they hold their slots until the test ends them."""

    def __init__(self) -> None:
        self.limiter = ConcurrencyLimiter(2, 1_000, lambda: 1_000.0)
        self.started: list[str] = []
        self.rejected: list[str] = []
        self._ends: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def call(self, name: str, caller: str, *, removal: bool = False) -> None:
        self._tasks.append(asyncio.create_task(self._run(name, caller, removal=removal)))
        await settle()

    async def _run(self, name: str, caller: str, *, removal: bool) -> None:
        try:
            self.limiter.check(caller, removal=removal)
            async with self.limiter.slot(SECONDS, caller, removal=removal):
                self.started.append(name)
                end = asyncio.Event()
                self._ends.append(end)
                await end.wait()
        except LatchkeyError:
            self.rejected.append(name)

    async def end_one(self) -> None:
        self._ends.pop(0).set()
        await settle()

    async def finish(self) -> None:
        while self._ends:
            await self.end_one()
        await asyncio.gather(*self._tasks)
        assert self.limiter.used == self.limiter.queued == 0


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_take_turns() -> None:
    """A caller's first call starts after at most one more of a flood."""
    scene = Scene()
    for number in range(10):
        await scene.call(f"flood {number}", "flood")
    await scene.call("other", "other")
    await scene.end_one()
    await scene.end_one()
    assert "other" in scene.started
    await scene.finish()
    assert scene.rejected == []
    assert len(scene.started) == 11


async def test_a_full_queue_makes_room_for_others() -> None:
    """When a caller's calls fill the queue, another caller's are accepted, up to an equal share.
    The newest of the first are rejected."""
    scene = Scene()
    for number in range(2 + 2 * BURST):
        await scene.call(f"flood {number}", "flood")
    assert scene.rejected == []
    for number in range(23):
        await scene.call(f"other {number}", "other")
    assert scene.rejected == [f"flood {1 + 2 * BURST - number}" for number in range(23)]
    await scene.call("one more", "flood")
    assert scene.rejected[-1] == "one more"
    await scene.finish()
    assert len([name for name in scene.started if name.startswith("other")]) == 23


async def test_a_refused_call_takes_no_place() -> None:
    """A call that passes the check and is then refused for another reason, such as its caller's
    rate, rejects no call of others."""
    scene = Scene()
    for number in range(2 + 2 * BURST):
        await scene.call(f"flood {number}", "flood")
    for _ in range(2 * BURST):
        scene.limiter.check("refused later")
    await settle()
    assert scene.rejected == []
    assert scene.limiter.queued == 2 * BURST
    await scene.finish()


async def test_removals_go_first() -> None:
    """A removal is accepted though the queue is full, and starts before all that wait, even those
    of the same caller."""
    scene = Scene()
    for number in range(2 + 2 * BURST):
        await scene.call(f"create {number}", "one")
    await scene.call("delete", "one", removal=True)
    assert scene.rejected == []
    await scene.end_one()
    assert scene.started[-1] == "delete"
    await scene.finish()


async def test_removals_leave_others_a_share() -> None:
    """While removals keep arriving, every fourth slot goes to other calls that wait."""
    scene = Scene()
    for number in range(2):
        await scene.call(f"first {number}", "one")
    for number in range(12):
        await scene.call(f"delete {number}", "flood", removal=True)
        await scene.call(f"get {number}", "other")
    for _ in range(12):
        await scene.end_one()
    assert len([name for name in scene.started if name.startswith("get")]) == 3
    await scene.finish()
    assert scene.rejected == []


async def test_removals_are_bounded() -> None:
    """Removals have a bound too."""
    scene = Scene()
    for number in range(2 + 2 * BURST + 1):
        await scene.call(f"delete {number}", "one", removal=True)
    assert scene.rejected == [f"delete {2 + 2 * BURST}"]
    await scene.finish()


@pytest.mark.parametrize(
    ("path", "request_", "expected"),
    [
        (ROTATE, pb.RotateRequest(), True),
        (ROTATE, pb.RotateRequest(grace=duration_pb2.Duration()), True),
        (ROTATE, pb.RotateRequest(grace=duration_pb2.Duration(nanos=1)), False),
        (ROTATE, pb.RotateRequest(grace=duration_pb2.Duration(seconds=60)), False),
        (ROTATE, pb.RotateRequest(retire_on_first_use=True), False),
        (UPDATE, pb.UpdateRequest(update_mask=FieldMask(paths=["name", "labels"])), False),
        (UPDATE, pb.UpdateRequest(update_mask=FieldMask(paths=["name", "scope"])), True),
        (UPDATE, pb.UpdateRequest(update_mask=FieldMask(paths=["expire_time"])), True),
        (UPDATE, pb.UpdateRequest(update_mask=FieldMask(paths=["permissions"])), True),
        (UPDATE, pb.UpdateRequest(), False),
    ],
)
def test_what_may_narrow(path: str, request_: Any, expected: bool) -> None:
    """A Rotate that ends the older secrets now, and an Update of a field that decides verdicts, go
    with the removals."""
    assert may_narrow(path, request_) == expected


def test_callers_of_some_accounts_have_default_rates() -> None:
    """A caller that the policy limits to accounts has a rate as a manager and as an operator.
    The policy can change it. Other callers have none."""
    policy = parse(
        policy_text() + "\n[callers.own]\nroles = ['manager']\naccounts = ['a']\n"
        f"credentials = ['sha256:{'0' * 64}']\nrates = {{ manager = 7 }}\n"
    )
    callers = {caller.name: caller for caller in policy.credentials.values()}
    assert callers["manager"].rates is None
    limited = callers["acmes-manager"].rates
    assert limited is not None
    assert limited.per_second == {"manager": 100, "operator": 20}
    own = callers["own"].rates
    assert own is not None
    assert own.per_second["manager"] == 7


def test_removals_are_counted_separately() -> None:
    """A caller that has used up its rate can still delete, at the same rate."""
    limits = RateLimits({"manager": 100})
    for removal in (False, True):
        for _ in range(100):
            limits.spend("manager", 1, 5.0, removal=removal)
        with pytest.raises(RateLimited):
            limits.spend("manager", 1, 5.0, removal=removal)


class Waiting:
    """A limiter whose calls have released their slots, like Deletes that wait for verifiers."""

    def __init__(self, total_max: int) -> None:
        self.limiter = ConcurrencyLimiter(2, total_max, lambda: 1_000.0)
        self._slots: dict[str, list[Any]] = {}

    async def fill(self, caller: str, tries: int) -> int:
        """Let a caller make calls until one is rejected. Return how many were accepted."""
        for accepted in range(tries):
            try:
                self.limiter.check(caller, removal=True)
            except Overloaded:
                return accepted
            slot = self.limiter.slot(SECONDS, caller, removal=True)
            await slot.__aenter__()
            slot.release()
            self._slots.setdefault(caller, []).append(slot)
        return tries

    async def end_one(self, caller: str) -> None:
        """End one of the caller's calls, if it has any."""
        if self._slots.get(caller):
            await self._slots[caller].pop().__aexit__(None, None, None)

    async def end(self, caller: str) -> None:
        for slot in self._slots.pop(caller):
            await slot.__aexit__(None, None, None)


async def test_one_caller_cannot_fill_the_total() -> None:
    """A caller whose Deletes wait for verifiers leaves room for others, each of which leaves room
    for a further one. When a caller has left, its room is free again."""
    scene = Waiting(100)
    assert await scene.fill("flood", 200) == 50
    assert await scene.fill("a", 200) == 25
    assert await scene.fill("b", 200) == 13
    assert await scene.fill("c", 200) == 6
    assert await scene.fill("flood", 1) == 0
    await scene.end("flood")
    assert await scene.fill("d", 200) == 28
    for caller in "abcd":
        await scene.end(caller)
    assert scene.limiter._total == 0
    assert scene.limiter._present == {}


@pytest.mark.parametrize("count", [1, 2, 3, 9])
async def test_shares_become_equal(count: int) -> None:
    """However unequally callers begin, each of n callers that all want more soon has 1/(n+1) of the
    total, as calls end and others take their places."""
    total = 1_000
    scene = Waiting(total)
    callers = [f"caller {number}" for number in range(count)]
    for caller in callers:
        await scene.fill(caller, total)
    order = random.Random(1)  # noqa: S311 - repeatable
    for _ in range(4 * total):
        await scene.end_one(order.choice(callers))
        for caller in order.sample(callers, count):
            await scene.fill(caller, 1)
    held = [scene.limiter._present[caller] for caller in callers]
    assert min(held) >= 0.8 * total / (count + 1)
    assert max(held) <= 1.1 * total / (count + 1)
    assert await scene.fill("newcomer", 1) == 1
    for caller in [*callers, "newcomer"]:
        await scene.end(caller)


async def test_many_newcomers_find_room() -> None:
    """Up to nine callers that arrive one after another, each with as many calls as are accepted,
    all find room."""
    scene = Waiting(1_000)
    for number in range(9):
        assert await scene.fill(f"caller {number}", 1_000) > 0, number


async def test_calls_without_a_name_share_the_total() -> None:
    """Without a policy, all calls have the same caller, and may fill the total."""
    scene = Waiting(100)
    assert await scene.fill("", 200) == 100
    await scene.end("")
    assert scene.limiter._present == {}
