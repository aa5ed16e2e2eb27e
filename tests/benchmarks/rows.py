"""The measured rows: each one's server, calls and check of the answers."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.tokens import page_tokens

from tests.benchmarks.answers import PAGE, Verified, right_create, right_list
from tests.benchmarks.seed import ACCOUNT, Seeded

__all__ = [
    "BATCH",
    "BATCHES_IN_FLIGHT",
    "IN_FLIGHT",
    "ONE",
    "READING",
    "TRANSPORTS",
    "WARM_SECRETS",
    "Row",
    "Sizes",
    "rows",
]

# Returns whether an answer fits its request, both serialised.
Check = Callable[[bytes, bytes], bool]

TRANSPORTS = ("native", "grpcio")
# As in a service that verifies one call at a time, and as in a busy one.
ONE, IN_FLIGHT = 1, 64
BATCH = 100
# Fewer than a server caches by default, so that none of them is evicted.
WARM_SECRETS = 50_000
# Batches that are sent in turn: 100,000 secrets in all.
BATCHES = 1_000
# As many as the service has connections for.
CREATES_IN_FLIGHT = 10
BATCHES_IN_FLIGHT = 10
SERVICE = "/latchkey.v1.TokenService/"
# Servers without a cache, by the database that they read.
READING = {"usual": "reading", "small": "small", "large": "large"}
# The first bytes of right answers: field 1 VALID and field 2, or field 1 as a message.
_VALID, _FIELD_1 = b"\x08\x01\x12", b"\x0a"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The number of tokens: for most rows, and for the two that show whether it matters."""

    usual: int
    small: int
    large: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `server` names the process. `requests` continues from slice to slice. Rows of one `group` are
    compared with each other, and so are measured one right after the other.
    """

    group: str
    name: str
    transport: str
    in_flight: int
    server: str
    path: str
    requests: Iterator[bytes]
    begins_with: bytes
    is_right: Check

    @property
    def key(self) -> tuple[str, str, int]:
        """Return the row's unique key."""
        return self.name, self.transport, self.in_flight


def rows(seeded: Mapping[str, Seeded], sizes: Sizes) -> list[Row]:
    """Return all rows. `seeded` contains the databases: usual, small, large.

    "warm" is answered from the server's cache, as by default; "reading" uses a server without a
    cache, so that each verify is a look-up in Postgres.
    """
    usual = seeded["usual"]
    found = []
    for transport, in_flight in itertools.product(TRANSPORTS, (ONE, IN_FLIGHT)):
        group = f"{transport} {in_flight}"
        constant = f"ceiling-{transport}"
        found += [
            _verify(group, "constant reply", transport, in_flight, constant, usual, _anything),
            _verify(group, "Verify, warm", transport, in_flight, transport, usual),
        ]
        if transport == "native":
            found.append(
                _verify(group, "Verify, reading", transport, in_flight, READING["usual"], usual)
            )
    for in_flight, name in itertools.product((ONE, IN_FLIGHT), ("small", "large")):
        title = f"Verify among {getattr(sizes, name):,}, reading"
        found.append(
            _verify(f"sizes {in_flight}", title, "native", in_flight, READING[name], seeded[name])
        )
    found += [
        _row(
            "batch",
            f"BatchVerify of {BATCH}, reading",
            BATCHES_IN_FLIGHT,
            "BatchVerify",
            itertools.cycle(_batches(usual)),
            Verified(usual).batch,
            READING["usual"],
        ),
        _row("create", "Create", CREATES_IN_FLIGHT, "Create", _creates(), right_create),
        *(_list(usual, page) for page in (1, sizes.usual // PAGE)),
    ]
    return found


def _verify(
    group: str,
    name: str,
    transport: str,
    in_flight: int,
    server: str,
    seeded: Seeded,
    is_right: Check | None = None,
) -> Row:
    requests = [
        pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ).SerializeToString()
        for secret, _ in (seeded.secrets[:WARM_SECRETS] if server in TRANSPORTS else seeded.secrets)
    ]
    return Row(
        group=group,
        name=name,
        transport=transport,
        in_flight=in_flight,
        server=server,
        path=SERVICE + "Verify",
        requests=itertools.cycle(requests),
        begins_with=_VALID,
        is_right=is_right or Verified(seeded).single,
    )


def _row(
    group: str,
    name: str,
    in_flight: int,
    method: str,
    requests: Iterator[bytes],
    is_right: Check,
    server: str = "native",
) -> Row:
    """Return a row of the service on `native` with the usual number of tokens."""
    return Row(
        group=group,
        name=name,
        transport="native",
        in_flight=in_flight,
        server=server,
        path=SERVICE + method,
        requests=requests,
        begins_with=_FIELD_1,
        is_right=is_right,
    )


def _anything(_request: bytes, _answer: bytes) -> bool:
    return True


def _batches(seeded: Seeded) -> list[bytes]:
    chosen = random.Random(1)  # noqa: S311 - for order, not for secrets
    return [
        pb.BatchVerifyRequest(
            requests=(
                pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ)
                for secret, _ in chosen.sample(seeded.secrets, BATCH)
            )
        ).SerializeToString()
        for _ in range(BATCHES)
    ]


def _creates() -> Iterator[bytes]:
    # In a separate account, because List's account has exactly the number of tokens for its
    # measurement.
    for number in itertools.count():
        yield pb.CreateRequest(
            account_id="bench-create", name=f"token {number}", scope=pb.SCOPE_READ
        ).SerializeToString()


def _list(seeded: Seeded, page: int) -> Row:
    request = pb.ListRequest(account_id=ACCOUNT, page_size=PAGE)
    if page > 1:
        position = seeded.position(PAGE * (page - 1))
        request.page_token = page_tokens.encode(ACCOUNT, position.key, position.id)
    requests = itertools.repeat(request.SerializeToString())
    return _row("list", f"List of {PAGE}, page {page:,}", ONE, "List", requests, right_list)
