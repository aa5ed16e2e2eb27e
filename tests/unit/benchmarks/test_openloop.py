"""The open loop against a server that a test plays: what is sent, and what is counted as what."""

import itertools
import select
import socket
import struct
import time

import pytest

from tests.benchmarks import http2
from tests.benchmarks.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    RST_STREAM,
    SETTINGS,
    frame,
)
from tests.benchmarks.openloop import Outcome, Run, Tally, Traffic, _Source, schedule
from tests.benchmarks.openloop_connection import LOST_MAX, REQUEST_BYTES_MAX, Connection

MS = 1_000_000
SECONDS_MAX = 10.0
REQUEST = b"\x0a\x03abc"
ANSWER = b"\x08\x01yes"


def status(code: int) -> bytes:
    text = str(code).encode()
    return b"\x88\x00\x0bgrpc-status" + bytes([len(text)]) + text


class Peer:
    """The server's side: it says what it is told to, and tells what has come."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS_MAX)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._socket: socket.socket | None = None
        self._rest = b""

    def accept(self, limit: int | None = None) -> None:
        self._hang_up()
        self._socket, _ = self._listener.accept()
        self._socket.settimeout(SECONDS_MAX)
        self._rest = b""
        preface = b""
        while len(preface) < len(http2.PREFACE):
            preface += self._socket.recv(len(http2.PREFACE) - len(preface))
        assert preface == http2.PREFACE
        self.settings(limit)

    def settings(self, limit: int | None) -> None:
        pairs = b"" if limit is None else struct.pack(">HI", MAX_CONCURRENT_STREAMS, limit)
        self.say(frame(SETTINGS, 0, 0, pairs))

    def say(self, *frames: bytes) -> None:
        assert self._socket is not None
        self._socket.sendall(b"".join(frames))

    def answer(self, stream: int, message: bytes = ANSWER, code: int = 0) -> None:
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        self.say(
            frame(HEADERS, END_HEADERS, stream, b"\x88"),
            frame(DATA, 0, stream, data),
            frame(HEADERS, END_HEADERS | END_STREAM, stream, status(code)),
        )

    def refuse(self, stream: int, code: int) -> None:
        self.say(frame(HEADERS, END_HEADERS | END_STREAM, stream, status(code)))

    def heard(self, kind: int, number: int) -> list[int]:
        """Return the streams of the next so many frames of this kind."""
        assert self._socket is not None
        streams: list[int] = []
        while len(streams) < number:
            while len(self._rest) < 9 or len(self._rest) < 9 + int.from_bytes(self._rest[:3]):
                self._rest += self._socket.recv(1 << 16)
            end = 9 + int.from_bytes(self._rest[:3])
            if self._rest[3] == kind:
                streams.append(int.from_bytes(self._rest[5:9]))
            self._rest = self._rest[end:]
        return streams

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        self._hang_up()
        self._listener.close()


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def connect(peer):
    made = []

    def connect(tally: Tally, limit: int | None = 2) -> Connection:
        connection = Connection(
            peer.address, "/x.Y/Z", b"\x08\x01", tally, timeout_seconds=0.25, in_flight_max=100
        )
        made.append(connection)
        peer.accept(limit)
        read_until(connection, lambda: connection.ready)
        return connection

    yield connect
    for connection in made:
        connection.close()


def read_until(connection: Connection, check) -> None:
    while not check():
        ready, _, _ = select.select([connection], [], [], SECONDS_MAX)
        assert ready, "nothing more is said"
        connection.read()


def call(connection: Connection, number: int = 1, *, arrived: int = 0, counts: bool = True) -> None:
    for _ in range(number):
        assert connection.has_room()
        connection.put((arrived, counts, REQUEST))
    connection.flush()


def test_calls_come_evenly():
    """At a constant rate each call comes one gap after the other, the first at once."""
    assert list(schedule(4, 1.0)) == [0, 250 * MS, 500 * MS, 750 * MS]
    assert len(schedule(12_345.6, 0.5)) == round(12_345.6 * 0.5)


def test_calls_come_by_chance():
    """With a seed they come as independent callers' do: Poisson, the same for the same seed."""
    moments = schedule(10_000, 2.0, seed=1)
    assert moments == schedule(10_000, 2.0, seed=1)
    assert moments != schedule(10_000, 2.0, seed=2)
    assert list(moments) == sorted(moments)
    assert moments[-1] < 2_000 * MS
    # The deviation is the root of it: 141.
    assert abs(len(moments) - 20_000) < 600
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    # Exponential: 1/e of the gaps are longer than their mean.
    assert abs(sum(gap > 100_000 for gap in gaps) / len(gaps) - 0.368) < 0.02


def test_each_ending_is_counted_as_what_it_is(peer, connect):
    """OK, refused, unavailable, too late and other are told apart, by trailers and by resets."""
    tally = Tally()
    connection = connect(tally, limit=100)
    now = time.perf_counter_ns()
    call(connection, 9, arrived=now)
    streams = peer.heard(HEADERS, 9)
    assert streams == list(range(1, 19, 2))
    peer.answer(streams[0])
    for stream, code in zip(streams[1:5], (8, 14, 4, 13), strict=True):
        peer.refuse(stream, code)
    # REFUSED_STREAM is UNAVAILABLE, ENHANCE_YOUR_CALM is RESOURCE_EXHAUSTED, others INTERNAL.
    for stream, error in zip(streams[5:8], (0x7, 0xB, 0x2), strict=True):
        peer.say(frame(RST_STREAM, 0, stream, error.to_bytes(4, "big")))
    peer.answer(streams[8], message=b"\x08\x02no")
    read_until(connection, lambda: not connection.sent)
    assert tally.sent == 9
    assert (tally.ok, tally.refused, tally.unavailable, tally.too_late) == (1, 2, 2, 1)
    assert tally.other == 3
    assert tally.wrong == 1
    assert tally.samples == [(REQUEST, ANSWER)]
    assert len(tally.refused_latencies) == 2


def test_answers_may_come_in_pieces(peer, connect):
    """Frames that are cut anywhere, and messages in several frames, are put together."""
    tally = Tally()
    connection = connect(tally)
    call(connection, 2, arrived=time.perf_counter_ns())
    data = b"\x00" + len(ANSWER).to_bytes(4, "big") + ANSWER
    whole = b"".join(
        [
            frame(HEADERS, END_HEADERS, 1, b"\x88"),
            frame(DATA, 0, 1, data[:3]),
            frame(DATA, 0, 1, data[3:]),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, status(0)),
        ]
    )
    for place in range(len(whole)):
        peer.say(whole[place : place + 1])
        read_until(connection, lambda: select.select([connection], [], [], 0)[0] == [])
    read_until(connection, lambda: tally.ok == 1)
    assert list(connection.sent) == [3]


def test_no_more_are_under_way_than_the_server_allows(peer, connect):
    """The limit holds as announced, and as changed while calls are under way."""
    tally = Tally()
    connection = connect(tally, limit=2)
    call(connection, 2, arrived=time.perf_counter_ns())
    assert not connection.has_room()
    peer.settings(3)
    read_until(connection, connection.has_room)
    call(connection, 1, arrived=time.perf_counter_ns())
    assert not connection.has_room()
    peer.settings(1)
    for stream in (1, 3):
        peer.answer(stream)
    read_until(connection, lambda: len(connection.sent) == 1)
    assert not connection.has_room()
    peer.answer(5)
    read_until(connection, connection.has_room)
    assert tally.ok == 3


def test_no_more_is_sent_than_the_window_takes(peer, connect):
    """A request that might not fit is not begun, and with a wider window it is."""
    connection = connect(Tally(), limit=100)
    large = bytes(http2.WINDOW_DEFAULT // 10)
    begun = 0
    while connection.has_room():
        connection.put((0, True, large))
        connection.flush()
        begun += 1
        peer.heard(DATA, 1)
    assert begun == (http2.WINDOW_DEFAULT - REQUEST_BYTES_MAX) // (len(large) + 5) + 1
    assert begun * (len(large) + 5) <= http2.WINDOW_DEFAULT
    peer.say(frame(http2.WINDOW_UPDATE, 0, 0, REQUEST_BYTES_MAX.to_bytes(4, "big")))
    read_until(connection, connection.has_room)
    with pytest.raises(ValueError, match="at most"):
        connection.put((0, True, bytes(REQUEST_BYTES_MAX)))


def test_call_that_is_out_of_time_is_cancelled_and_its_answer_ignored(peer, connect):
    """At its deadline a call is given up, the server is told, and what it says then is too late."""
    tally = Tally()
    connection = connect(tally)
    call(connection, 1, arrived=0)
    call(connection, 1, arrived=2 * MS)
    connection.expire(MS)
    assert list(connection.sent) == [3]
    assert connection.has_room()
    assert peer.heard(RST_STREAM, 1) == [1]
    peer.answer(1)
    peer.refuse(3, 8)
    read_until(connection, lambda: not connection.sent)
    assert (tally.too_late, tally.refused, tally.ok) == (1, 1, 0)


def test_right_answer_after_the_deadline_is_too_late(peer, connect):
    """Goodput has what is of use: not an answer that nobody waits for any more."""
    tally = Tally(within=True)
    connection = connect(tally)
    call(connection, 1, arrived=time.perf_counter_ns() - 251 * MS)
    peer.answer(1)
    read_until(connection, lambda: not connection.sent)
    assert (tally.ok, tally.good, tally.too_late) == (0, 0, 1)


def test_goodput_has_the_answers_that_came_within_the_stretch(peer, connect):
    """Calls before the stretch count when answered within it, and none that is answered after."""
    tally = Tally(within=True)
    connection = connect(tally)
    call(connection, 1, arrived=time.perf_counter_ns(), counts=False)
    peer.answer(1)
    read_until(connection, lambda: not connection.sent)
    assert (tally.sent, tally.ok, tally.good) == (0, 0, 1)
    tally.within = False
    call(connection, 1, arrived=time.perf_counter_ns())
    peer.answer(3)
    read_until(connection, lambda: not connection.sent)
    assert (tally.sent, tally.ok, tally.good) == (1, 1, 1)


def test_lost_connection_is_made_anew(peer, connect):
    """Calls under way on it are lost, and later ones go out on a new one."""
    tally = Tally()
    connection = connect(tally)
    call(connection, 2, arrived=time.perf_counter_ns())
    peer._hang_up()
    read_until(connection, lambda: tally.connections_lost == 1)
    assert tally.unavailable == 2
    assert not connection.has_room()
    peer.accept(limit=2)
    read_until(connection, connection.has_room)
    call(connection, 1, arrived=time.perf_counter_ns())
    peer.answer(1)
    read_until(connection, lambda: tally.ok == 1)


def test_server_may_send_its_clients_away(peer, connect):
    """After GOAWAY what it has taken is still answered, the rest is not, and nothing new goes
    out before there is a new connection."""
    tally = Tally()
    connection = connect(tally, limit=5)
    call(connection, 2, arrived=time.perf_counter_ns())
    peer.say(frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
    read_until(connection, lambda: tally.unavailable == 1)
    assert list(connection.sent) == [1]
    assert not connection.has_room()
    peer.answer(1)
    read_until(connection, lambda: tally.connections_lost == 1)
    assert tally.ok == 1
    peer.accept(limit=2)
    read_until(connection, connection.has_room)


def test_server_that_loses_all_connections_is_an_error(connect):
    """The generator does not connect for ever."""
    connection = connect(Tally(connections_lost=LOST_MAX))
    with pytest.raises(http2.LoadError):
        connection._lost()


@pytest.fixture
def source(peer):
    """Ten calls a second apart, of which the first two are the warm-up."""
    made = []

    def source(connections: int, limit: int) -> _Source:
        traffic = Traffic("/x.Y/Z", itertools.repeat(REQUEST), b"\x08\x01", 1.0, connections, 9.0)
        source = _Source(peer.address, traffic, warm_up_seconds=2.0, seconds=8.0)
        made.append(source)
        for connection in source.connections:
            connection._limit = limit
        return source

    yield source
    for each in made:
        each.close()


def test_all_that_arrive_are_sent_or_held_back(source):
    """Nothing is lost between the schedule and the server, and the warm-up is not counted."""
    source = source(connections=2, limit=3)
    put = source.arrive(0, 4_500 * MS)
    assert [sent[0] // MS for sent in put] == [0, 1_000, 2_000, 3_000, 4_000]
    assert [sent[1] for sent in put] == [False, False, True, True, True]
    # In turn.
    assert [len(connection.sent) for connection in source.connections] == [3, 2]
    assert len(source.arrive(0, 9_500 * MS)) == 1
    assert source.over
    assert not source.done
    assert (source.tally.sent, source.held_back) == (4, 4)
    assert source.tally.sent + source.held_back == len(source.moments) - source.first_counted


def test_nobody_is_held_back_in_the_warm_up(source):
    """What found no room before the stretch is not counted, even if seen in it."""
    source = source(connections=1, limit=1)
    source.arrive(0, 2_500 * MS)
    assert (source.tally.sent, source.held_back) == (0, 1)


def outcome(latencies: list[int], too_late: int = 0) -> Outcome:
    tally = Tally(latencies=latencies)
    tally.failed[4] = too_late
    return Outcome(1.0, 0, 0, 0.0, 1.0, tally)


def test_percentiles_have_the_calls_that_were_too_late():
    """A server that answers few calls fast and lets the others wait is not a fast one."""
    hundred = [number * 1_000 for number in range(1, 101)]
    assert outcome(hundred).percentile_us(0.50) == 51
    assert outcome(hundred).percentile_us(0.99) == 100
    assert outcome(hundred, too_late=2).percentile_us(0.99) == 1e6
    assert outcome(hundred, too_late=300).percentile_us(0.50) == 1e6
    assert outcome([]).percentile_us(0.99) == 1e6


def test_generator_tells_whether_it_kept_up():
    """A core that was busy, or calls that were sent late, make the figures its own."""
    assert Run([], late_ms=0.1, cpu_share=0.5, metered=()).kept_up
    assert not Run([], late_ms=0.1, cpu_share=0.99, metered=()).kept_up
    assert not Run([], late_ms=20.0, cpu_share=0.5, metered=()).kept_up
