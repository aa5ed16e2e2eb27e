"""The format of the conformance cases. `proto/conformance/schema.json` is generated from it.

`python -m tests.conformance.cases` writes the schema. Run it after a change here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from latchkey_coherence.verdict_cache import Position
from pydantic import BaseModel, ConfigDict, Field

from tests.helpers.repository import ROOT

__all__ = ["Case", "Group", "load", "position_of", "schema"]

DIRECTORY: Final = ROOT / "proto" / "conformance"
SCHEMA: Final = DIRECTORY / "schema.json"
_LEFT_OUT: Final = ("default", "title")

PositionText = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{1,19}:[0-9]{1,20}$",
        description="A position: revision (int64), a colon, mark (uint64). 0:0 means no history.",
    ),
]
TokenId = Annotated[str, Field(pattern=r"^[a-z0-9]+$", description="A token's id.")]
Number = Annotated[
    str,
    Field(
        pattern=r"^[a-z][a-z0-9]*$",
        description="Stands for the number of a request. The first `sends` that uses it defines "
        "it. The number must be above 0 and above all earlier numbers on its stream.",
    ),
]
StreamName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*$")]
Seconds = Annotated[
    float, Field(description="Seconds on the clock with which leases are measured.")
]
Verdict = Literal[
    "VALID",
    "ADDRESS_NOT_ALLOWED",
    "INSUFFICIENT_SCOPE",
    "INSUFFICIENT_PERMISSIONS",
    "RATE_LIMITED",
    "DELETED",
    "DISABLED",
    "EXPIRED",
    "UNKNOWN",
    "UNSPECIFIED",
]
Scope = Literal["READ", "WRITE"]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Send(_Form):
    """A WatchRequest that the client sends."""

    stream: StreamName
    applied: PositionText
    asks: Number | None = Field(None, description="Absent: `number` is 0.")
    released: bool = Field(False, description="Absent: false.")


class Invalidation(_Form):
    """WatchResponse.invalidation."""

    kind: Literal["invalidation"]
    position: PositionText
    token_ids: list[TokenId]


class Grant(_Form):
    """WatchResponse.grant."""

    kind: Literal["grant"]
    position: PositionText
    number: Number | None = Field(description="The request that the grant answers. null: number 0.")
    offset: int = Field(0, description="Added to the number, to make an unrequested grant.")
    seconds: float
    imported_prefixes: list[str] = Field(
        [], description="The prefixes of imported secrets. Absent: the server accepts none."
    )


class Reset(_Form):
    """WatchResponse.reset."""

    kind: Literal["reset"]
    position: PositionText


class Closing(_Form):
    """WatchResponse.closing."""

    kind: Literal["closing"]


class RateLimit(_Form):
    """A token's rate_limit."""

    count: int
    period_seconds: int
    burst: int


class Shares(_Form):
    """WatchResponse.rate_shares, in answer to the client's last question on the stream."""

    kind: Literal["shares"]
    calls: dict[TokenId, int] = Field(description="The calls of each token.")
    rate_limit: RateLimit = Field(description="The limit under which they were issued.")
    seconds: float
    offset: int = Field(
        0, description="Added to the number of the question, to make an answer to no question."
    )


class Unknown(_Form):
    """A WatchResponse whose `event` is not part of this version of the contract."""

    kind: Literal["unknown"]


Event = Annotated[
    Invalidation | Grant | Reset | Closing | Shares | Unknown, Field(discriminator="kind")
]


class Reported(_Form):
    """The uses of one token in all reports so far."""

    count: int = Field(description="The sum of all counts.")
    first: Seconds = Field(description="The time of the first use: `at` less its age.")
    last: Seconds = Field(description="The time of the last use.")


class Expect(_Form):
    """The expected state after a step. Absent parts are not checked."""

    lease_ends: Seconds | None = Field(
        None, description="When cached answers end, to a microsecond. null: no lease."
    )
    applied: PositionText | None = None
    remembers: list[TokenId] | None = Field(
        None, description="The tokens with a verdict in the cache, in any order."
    )
    leave: list[StreamName] | None = Field(
        None, description="The streams that the client must replace."
    )
    give_up_at: dict[StreamName, Seconds | None] | None = Field(
        None,
        description="When the client looks for another stream, if it receives nothing more on this "
        "one. null: it does not.",
    )
    reported: dict[TokenId, Reported] | None = Field(
        None,
        description="All uses that the client has reported, to a millisecond. A client may split "
        "them into any number of reports.",
    )
    asks_at_most: dict[TokenId, int] | None = Field(
        None,
        description="The calls of each token in all questions for shares so far: at most these, "
        "and at least one of each.",
    )


class _Step(_Form):
    at: Seconds
    sends: list[Send] = Field(
        [],
        description="Everything that the client sends in this step, in order on each stream. A "
        "client may split a message that confirms and asks in two, with the confirmation first. "
        "Messages with a report of uses or a question for shares are not listed.",
    )
    expect: Expect = Expect()


class Open(_Step):
    """The client opens a Watch stream."""

    do: Literal["open"]
    stream: StreamName


class Receive(_Step):
    """The client receives an event, and handles it before anything else happens."""

    do: Literal["receive"]
    stream: StreamName
    event: Event


class Break(_Step):
    """A stream's connection is lost. The client neither sends nor receives anything on it."""

    do: Literal["break"]
    stream: StreamName


class Mute(_Step):
    """From now on, the server confirms no report of uses on this stream. Otherwise it confirms each
    report at once."""

    do: Literal["mute"]
    stream: StreamName


class _Question(_Step):
    """What the holder wants to do."""

    asked_scope: Scope | None = None
    client_address: str = Field("", description="The holder's address. Empty: not known.")
    permissions: list[str] = Field([], description="The permissions that are required.")


class Answer(_Question):
    """The service's answer to a Verify arrives: a verdict about a token. UNSPECIFIED stands for a
    verdict that the client does not know."""

    do: Literal["answer"]
    token_id: TokenId = Field(description="The token. For UNKNOWN, stands for the secret.")
    verdict: Verdict
    token_scope: Scope = "READ"
    token_networks: list[str] = Field([], description="The token's allowed_networks.")
    token_permissions: list[str] = Field([], description="The token's permissions.")
    token_rate_limit: RateLimit | None = Field(None, description="The token's rate_limit.")
    retry_after: float | None = Field(None, description="Seconds. Present with RATE_LIMITED.")
    position: PositionText
    keeps: bool = Field(description="Whether the client may keep the verdict, and this one does.")


class Verify(_Question):
    """A holder presents the token's secret to the client."""

    do: Literal["verify"]
    token_id: TokenId
    from_memory: Verdict | None = Field(description="null: the client must ask the service.")


class Present(_Step):
    """A holder presents a string that is not in the cache."""

    do: Literal["present"]
    text: str
    refuses: bool = Field(
        description="true: the client may answer MALFORMED by itself, and this one does. false: it "
        "must ask the service."
    )


class Wait(_Step):
    """Time passes until `at`."""

    do: Literal["wait"]


class Release(_Step):
    """The client is about to stop. It permanently stops answering from its cache, and reports
    that.
    """

    do: Literal["release"]


Step = Annotated[
    Open | Receive | Break | Mute | Answer | Verify | Present | Wait | Release,
    Field(discriminator="do"),
]


class Case(_Form):
    """One scenario. The client begins with an empty cache and no known history."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    rules: list[Annotated[int, Field(ge=1, le=13)]] = Field(
        min_length=1, description="The rules of docs/protocol.md that the case is about."
    )
    level: Literal["must", "should", "reporting", "sharing"] = Field(
        description="must: a client that fails may answer VALID for a deleted token, make Deletes "
        "wait, or refuse a valid secret. should: a client that fails is safe, but answers from its "
        "cache less often. reporting: for clients that report uses. sharing: for clients that "
        "spend shares; one that fails may accept more verifies than a rate limit permits.",
    )
    story: str
    cache_entries: int = Field(100, ge=0, description="How many verdicts the client may keep.")
    cache_seconds: float = Field(300.0, gt=0, description="How long it may keep one.")
    steps: list[Step] = Field(min_length=1)


class Group(_Form):
    """A file of cases."""

    about: str
    cases: list[Case] = Field(min_length=1)


def position_of(text: str) -> Position:
    """Parse a position."""
    revision, mark = text.split(":")
    return Position(int(revision), int(mark))


def load() -> dict[str, Case]:
    """Return all cases by name. Raises ValueError for a file that breaks the format."""
    found: dict[str, Case] = {}
    for path in sorted((DIRECTORY / "cases").glob("*.json")):
        for case in Group.model_validate_json(path.read_bytes(), strict=True).cases:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name}")
            found[case.name] = case
    return found


def schema() -> str:
    """Return the JSON Schema of a file of cases."""
    generated = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Latchkey conformance cases for clients that answer from a cache",
        **_plain(Group.model_json_schema()),
    }
    return json.dumps(generated, indent=1, ensure_ascii=False) + "\n"


def _plain(part: Any) -> Any:
    """Remove generated titles, which repeat names, and defaults, which the descriptions explain."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items() if key not in _LEFT_OUT}
    return part


if __name__ == "__main__":
    SCHEMA.write_text(schema(), "utf-8")
