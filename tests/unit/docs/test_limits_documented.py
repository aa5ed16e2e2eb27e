"""docs/limits.md: each limit, and each statement about it, has a test that this file names."""

import ast
import re
from functools import cache

import pytest
from latchkey_service.access.methods import METHODS
from latchkey_service.access.rates import DEFAULT_PER_SECOND
from latchkey_service.coherence.use_reports import USES_IN_REPORT_MAX
from latchkey_service.coherence.watch_sessions import WATCH_SESSIONS_MAX
from latchkey_service.fair_queue import SMALL_BYTES
from latchkey_service.process.worker_watch import memory_max_bytes
from latchkey_service.rpc import (
    admission,
    handlers,
    maintenance_service,
    managed_calls,
    refused_calls,
    streams,
)
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.batched_lookup import BUSY, STANDING, WAITING_MAX
from latchkey_service.tokens.usage import USES_PENDING_MAX
from latchkey_service.transport import (
    connection_shares,
    memory_pressure,
    native,
    native_queues,
    transports,
)

from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/limits.md").read_text("utf-8")
TRANSPORT = "tests/integration/transport/test_limits.py::"
HOSTILE = "tests/integration/transport/test_hostile_peers.py::"
PROCESS = "tests/integration/process/test_limits.py::"
ENVOY = "tests/integration/transport/test_envoy.py::"
ENVOY_IDLE = "tests/integration/transport/test_envoy_idle.py::test_idle_connections_end"
ENVOY_FILE = (ROOT / "docs/envoy.yaml").read_text("utf-8")
NATIVE = "tests/unit/transport/test_native.py::"
QUEUES = "tests/unit/transport/test_native_queues.py::"
ADMISSION = "tests/unit/rpc/test_admission.py::"
FAIR = "tests/unit/rpc/test_fair_admission.py::"
SESSIONS = "tests/unit/coherence/test_watch_sessions.py::"
REQUESTS = "tests/contract/test_request_limits.py::"
PRESSURE = "tests/integration/rpc/test_memory_pressure.py::"
JUDGED = "tests/unit/transport/test_memory_pressure.py::"
MIB = 1024 * 1024

# By the first cell of the row: the tests, and numbers that the row must contain.
ROWS: dict[str, tuple[tuple[str, ...], tuple[object, ...]]] = {
    "connections": (
        (
            TRANSPORT + "test_connections",
            PROCESS + "test_connections_max",
            ENVOY + "test_limits_of_connections",
        ),
        (transports.Limits().connections_max, transports.CONNECTIONS_SPARE),
    ),
    "connections from one IP address": (
        (
            HOSTILE + "test_connections_per_address",
            HOSTILE + "test_proxies_have_no_limit_per_address",
        ),
        (Settings.model_fields["connections_per_address"].default,),
    ),
    "concurrent calls per connection": (
        (TRANSPORT + "test_concurrent_streams",),
        (transports.STREAMS_MAX,),
    ),
    "metadata of a call": (
        (
            TRANSPORT + "test_metadata",
            "tests/integration/rpc/test_refused_calls.py::test_large_metadata_end_the_connection",
        ),
        (transports.METADATA_BYTES_MAX // 1024, handlers.METADATA_BYTES_MAX // 1024),
    ),
    "message": (
        (TRANSPORT + "test_message", ENVOY + "test_limits_of_messages"),
        (transports.MESSAGE_BYTES_MAX // MIB,),
    ),
    "request of a method": (
        (
            REQUESTS + "test_each_method_has_a_limit",
            REQUESTS + "test_streams_refuse_large_messages",
        ),
        tuple({rule.bytes_max // 1024 for rule in METHODS.values()}),
    ),
    "compressed message": (
        (
            TRANSPORT + "test_compressed_message",
            PROCESS + "test_a_worker_that_uses_too_much_memory",
        ),
        (),
    ),
    "TLS and HTTP/2 handshake": (
        (TRANSPORT + "test_unfinished_handshake", ENVOY_IDLE),
        (f"{transports.HANDSHAKE_SECONDS:g}",),
    ),
    "pings": (
        (TRANSPORT + "test_ping_flood", TRANSPORT + "test_ping_flood_native"),
        (f"{transports.PING_SECONDS_MIN:g}",),
    ),
    "idle connection": (
        (TRANSPORT + "test_unanswered_pings", ENVOY_IDLE),
        (f"{transports.KEEPALIVE_SECONDS:g}", f"{transports.KEEPALIVE_TIMEOUT_SECONDS:g}"),
    ),
    "answers that the client's kernel does not accept": (
        (
            TRANSPORT + "test_unread_answers",
            "tests/unit/process/test_limits.py::test_idle_connection_is_not_stuck_at_once",
        ),
        (f"{transports.KEEPALIVE_TIMEOUT_SECONDS:g}",),
    ),
    "answers for which the client opens no HTTP/2 window": (
        (TRANSPORT + "test_no_window",),
        (f"{transports.AGE_GRACE_SECONDS:g}",),
    ),
    "answer of `BatchVerify`": (
        (
            "tests/unit/rpc/test_batch_answer.py::test_the_largest_answer_fits_into_grpcs_default_limit",
            "tests/unit/rpc/test_batch_answer.py::test_answers_without_details_are_small",
        ),
        (),
    ),
    "page of tokens, `List` and a dry run of `DeleteAll`": (
        (REQUESTS + "test_pages_of_large_tokens_fit",),
        (),
    ),
    "concurrent calls with large answers": ((ENVOY + "test_limits_of_connections",), ()),
    "age of a connection": (
        (TRANSPORT + "test_age", TRANSPORT + "test_age_grace", ENVOY_IDLE),
        (f"{transports.AGE_GRACE_SECONDS:g}",),
    ),
    "age of a Watch": (
        (
            PROCESS + "test_a_verifier_outlives_its_connections",
            SESSIONS + "test_an_old_stream_is_asked_to_move",
        ),
        (),
    ),
    "Watch whose client sends nothing": ((SESSIONS + "test_a_silent_client_is_dropped",), ()),
    "Watch whose client does not read": (
        (SESSIONS + "test_a_client_that_does_not_read_is_dropped",),
        (),
    ),
    "health Watch whose client does not read": (
        (
            NATIVE + "test_unread_stream_is_ended",
            "tests/integration/transport/test_native.py::test_unread_streams_block_nothing",
            ENVOY_IDLE,
        ),
        (f"{native.UNREAD_SECONDS:g}",),
    ),
    "uses reported on a Watch": (
        (
            REQUESTS + "test_largest_report_of_uses_fits",
            "tests/unit/coherence/test_use_reports.py::test_a_client_that_does_not_wait_is_ignored",
        ),
        (USES_IN_REPORT_MAX,),
    ),
    "messages on a Watch": (
        ("tests/unit/rpc/test_paced_streams.py::test_a_stream_that_sends_too_much_is_ended",),
        (
            streams.STREAM_BYTES_BURST // MIB,
            streams.STREAM_BYTES_PER_SECOND // MIB,
            streams.MESSAGE_BYTES,
        ),
    ),
    "uses that wait to be written": (
        (
            "tests/unit/tokens/test_usage.py::test_a_full_buffer_drops_new_entries_only",
            "tests/unit/tokens/test_usage.py::test_callers_share_the_room_for_reports",
        ),
        (USES_PENDING_MAX,),
    ),
    "Watches": (
        (
            SESSIONS + "test_number_of_streams_is_limited",
            "tests/contract/test_admission.py::test_streams_per_caller_are_limited",
        ),
        (WATCH_SESSIONS_MAX,),
    ),
    "streams that need no identity: health Watches and reflection": (
        (HOSTILE + "test_health_watches_are_bounded",),
        (streams.OPEN_STREAMS_MAX, streams.OPEN_STREAMS_PER_ADDRESS_MAX),
    ),
    "questions and calls per second": (
        (
            "tests/contract/test_admission.py::test_each_caller_has_its_own_rate",
            FAIR + "test_callers_of_some_accounts_have_default_rates",
        ),
        tuple(f"{rate:g}" for rate in DEFAULT_PER_SECOND.values()),
    ),
    "refusals of calls without an identity, and of unknown methods": (
        (
            "tests/unit/rpc/test_refused_calls.py::test_refusals_are_paced",
            HOSTILE + "test_anonymous_calls_do_not_delay_known_callers",
        ),
        (
            refused_calls.PER_SECOND,
            admission.REJECTIONS_AT_ONCE,
            f"{refused_calls.SECONDS_MAX:g}",
        ),
    ),
    "calls that wait for such a refusal": (
        (
            "tests/unit/rpc/test_refused_calls.py::test_open_calls_of_an_address_are_bounded",
            "tests/unit/rpc/test_refused_calls.py::test_open_calls_of_a_worker_are_bounded",
            HOSTILE + "test_too_many_refused_calls_end_connections",
            QUEUES + "test_delayed_rejections_are_bounded",
        ),
        (refused_calls.OPEN_MAX, refused_calls.OPEN_PER_ADDRESS_MAX, native.DELAYED_MAX),
    ),
    "calls that wait to start": (
        (
            NATIVE + "test_queues_are_bounded",
            QUEUES + "test_health_checks_are_bounded",
            QUEUES + "test_the_bytes_of_a_queue_are_bounded",
        ),
        (
            native_queues.STANDING,
            native_queues.BURST,
            native_queues.QUEUED_BYTES_MAX // MIB,
            SMALL_BYTES // 1024,
        ),
    ),
    "management calls": (
        (
            "tests/contract/test_admission.py::test_calls_that_wait_for_the_database_are_bounded",
            ADMISSION + "test_standing_queue_rejects_at_once",
            FAIR + "test_removals_are_bounded",
            FAIR + "test_one_caller_cannot_fill_the_total",
        ),
        (
            *managed_calls.CONCURRENCY_LIMITS["manager"],
            managed_calls.CONCURRENCY_LIMITS["manager"][0] * admission.BURST,
        ),
    ),
    "operators' and revokers' calls": (
        (ADMISSION + "test_released_slot_frees_capacity_but_call_still_counts",),
        (
            *managed_calls.CONCURRENCY_LIMITS["operator"],
            *managed_calls.CONCURRENCY_LIMITS["revoker"],
            managed_calls.CONCURRENCY_LIMITS["operator"][0] * admission.BURST,
        ),
    ),
    "calls of `InvalidateAll`": (
        ("tests/contract/test_maintenance.py::test_an_operator_in_a_loop_makes_no_verify_fail",),
        (),
    ),
    "importers' calls": (
        (ADMISSION + "test_released_slot_frees_capacity_but_call_still_counts",),
        (
            *managed_calls.CONCURRENCY_LIMITS["importer"],
            managed_calls.CONCURRENCY_LIMITS["importer"][0] * admission.BURST,
        ),
    ),
    "verifies that read the database": (
        (
            "tests/integration/tokens/test_batched_lookup.py::test_the_queue_is_bounded",
            "tests/integration/tokens/test_batched_lookup.py::test_a_standing_queue_is_limited",
        ),
        (WAITING_MAX, BUSY + STANDING),
    ),
    "verifies of imported secrets that read the database": (
        (
            "tests/unit/tokens/test_imported.py::test_caller_cannot_fill_the_queue",
            "tests/unit/tokens/test_imported.py::test_stuck_look_ups_of_imported_secrets_delay_no_others",
        ),
        (),
    ),
    "silence of a worker's event loop": (
        ("tests/integration/process/test_worker_watch.py::test_a_worker_that_hangs",),
        (),
    ),
    "memory of a worker, by connections that have shown no identity": (
        (
            PRESSURE + "test_anonymous_calls_end_their_connections_and_not_the_worker",
            JUDGED + "test_connections_end_only_above_the_threshold",
        ),
        (),
    ),
    "memory of a worker": (
        (
            PROCESS + "test_a_worker_that_uses_too_much_memory",
            "tests/unit/process/test_limits.py::test_memory",
        ),
        (),
    ),
}

# By the words in bold at the beginning of a paragraph or an item.
PARAGRAPHS: dict[str, tuple[str, ...]] = {
    "Requests": (
        REQUESTS + "test_callers_are_authorized_before_anything_is_parsed",
        REQUESTS + "test_largest_legal_requests_fit",
        "tests/integration/rpc/test_refused_calls.py::test_refused_calls_leave_no_memory_behind",
        HOSTILE + "test_large_anonymous_messages_are_not_received",
    ),
    "Queues": (ADMISSION + "test_burst_may_queue_but_standing_queue_is_short",),
    "Shares": (
        QUEUES + "test_anonymous_calls_take_no_place",
        QUEUES + "test_a_full_queue_is_shared",
        FAIR + "test_a_full_queue_makes_room_for_others",
        "tests/integration/rpc/test_shares.py::test_one_caller_does_not_crowd_out_another",
    ),
    "Removals": (
        QUEUES + "test_removals_go_first",
        FAIR + "test_removals_go_first",
        FAIR + "test_what_may_narrow",
        FAIR + "test_removals_are_counted_separately",
    ),
    "Malformed calls.": (
        "tests/contract/test_malformed_calls.py::test_malformed_deadlines_are_refused",
        "tests/contract/test_malformed_calls.py::test_unusual_calls",
    ),
    "The connection guard": (
        TRANSPORT + "test_the_guard_affects_no_other_socket",
        HOSTILE + "test_idle_connections_keep_nobody_out",
        "tests/unit/access/test_origin.py::test_addresses",
    ),
    "Files.": (
        PROCESS + "test_open_files_per_watch",
        PROCESS + "test_too_few_files_are_reported",
        PROCESS + "test_a_flood_that_uses_all_files",
    ),
    "Keepalive of clients.": (TRANSPORT + "test_our_own_pings",),
    "The maximum age": (PROCESS + "test_a_verifier_outlives_its_connections",),
    "Both transports buffer a message until it is complete": (
        PROCESS + "test_a_worker_that_uses_too_much_memory",
    ),
    "`native` keeps answers for a client that opens no HTTP/2 window": (
        "tests/unit/process/test_worker_watch.py::test_memory",
    ),
    "A client that reads a byte now and then": (TRANSPORT + "test_age_grace",),
    "`native` answers every ping.": (TRANSPORT + "test_ping_flood_native",),
    "Each open call takes memory": (
        HOSTILE + "test_a_flood_from_one_address_does_not_end_a_worker",
        PRESSURE + "test_anonymous_calls_end_their_connections_and_not_the_worker",
        JUDGED + "test_free_memory_ends_no_connection",
    ),
    "`grpcio` may notice late that a client has gone.": (TRANSPORT + "test_unanswered_pings",),
    "`grpcio` reads excessive metadata before it rejects them": (
        HOSTILE + "test_too_much_metadata_ends_its_connection",
    ),
}


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def rows() -> dict[str, str]:
    """Return the rows of the table, by the first cell."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    lines = [line for line in lines[1:] if "---" not in line]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_every_row_has_a_test() -> None:
    """Each row of the table has tests, and none has been removed from the table alone."""
    assert list(rows()) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_rows_have_the_numbers_of_the_code(name: str) -> None:
    """Each row states the values that are in force."""
    said = re.findall(r"\d+", rows()[name].replace(",", ""))
    for number in ROWS[name][1]:
        assert str(number) in said, number


def test_every_paragraph_has_a_test() -> None:
    """Each paragraph or item that begins with words in bold has tests."""
    found = re.findall(r"^(?:- )?\*\*(.+?)\*\*", PAGE, re.MULTILINE)
    assert [name.removesuffix(".") for name in found] == [
        name.removesuffix(".") for name in PARAGRAPHS
    ]


@pytest.mark.parametrize(
    "named",
    sorted({*(n for names, _ in ROWS.values() for n in names), *sum(PARAGRAPHS.values(), ())}),
)
def test_named_tests_exist(named: str) -> None:
    """Each named test exists."""
    path, _, name = named.partition("::")
    assert name in functions_in(path)


def test_idle_connections() -> None:
    """The page states the time after which a connection counts as idle."""
    assert connection_shares.IDLE_SECONDS == 10
    assert "at least ten seconds" in PAGE


def test_memory() -> None:
    """The page states the default limits on memory, and the share at which connections end."""
    fields = Settings.model_fields
    settings = Settings.model_construct(**{name: one.default for name, one in fields.items()})
    tls = settings.model_copy(update={"tls_listen": "localhost:1"})
    plain_gib, tls_gib = (round(memory_max_bytes(one) / 1024 / MIB) for one in (settings, tls))
    assert f"it is about {plain_gib} GiB, or {tls_gib} GiB\nwith a TLS listener" in PAGE
    assert memory_pressure.PRESSURE_SHARE == 0.5


@pytest.mark.parametrize(
    ("limit", "row", "said"),
    [
        ("max_active_downstream_connections: 8000", "connections", "8,000 in total"),
        ("transport_socket_connect_timeout: 10s", "TLS and HTTP/2 handshake", "10 s for TLS"),
        ("idle_timeout: 60s,", "TLS and HTTP/2 handshake", "then 60 s for HTTP/2"),
        ("idle_timeout: 60s,", "idle connection", "60 s without a call"),
        ("max_connection_duration: 600s", "age of a connection", "10 minutes"),
        ("max_stream_duration: 660s", "age of a connection", "11 minutes for a health Watch"),
        ("max_stream_duration: 660s", "health Watch whose client does not read", "11 minutes"),
        ("max_requests: 64", "concurrent calls with large answers", "64 `BatchVerify`"),
        ("max_requests: 16", "concurrent calls with large answers", "16 lists"),
        (
            "stream_idle_timeout: 30s",
            "answers for which the client opens no HTTP/2 window",
            "ends the call after 30 s",
        ),
        (
            "idle_timeout: 15s",
            "answers for which the client opens no HTTP/2 window",
            "a `BatchVerify` after 15 s",
        ),
    ],
)
def test_limits_of_envoy(limit: str, row: str, said: str) -> None:
    """The rows state the values of the documented configuration of Envoy."""
    assert limit in ENVOY_FILE
    assert said in rows()[row]


def test_pause_between_invalidations() -> None:
    """The page states the pause between two calls of InvalidateAll."""
    assert f"{maintenance_service.PAUSE_SECONDS:g} s" in rows()["calls of `InvalidateAll`"]
