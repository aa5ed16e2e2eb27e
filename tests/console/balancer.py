"""A load balancer without stickiness: each request goes to the next process of the console."""

import http.client
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# A change waits for verifiers for a few seconds.
ANSWER_SECONDS = 30.0
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


class Balancer(ThreadingHTTPServer):
    """Listens on `url` and forwards to `ports`. `served` counts the requests of each port.

    Static files take no turn, so that a form and the redirect after it always reach different
    processes.
    """

    daemon_threads = True

    def __init__(self, ports: tuple[int, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ports = ports
        self.served: dict[int, list[str]] = {port: [] for port in ports}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._turns = itertools.cycle(ports)
        self._lock = threading.Lock()

    def port_for(self, request: str) -> int:
        """Return the port of the process whose turn it is."""
        with self._lock:
            if "/static/" in request:
                return self.ports[0]
            port = next(self._turns)
            self.served[port].append(request)
            return port


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Balancer

    def _forward(self) -> None:
        port = self.server.port_for(f"{self.command} {self.path.partition('?')[0]}")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.putheader("content-length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_HEAD = _forward  # noqa: N815 - the names that http.server looks up


@contextmanager
def balancer(*ports: int) -> Iterator[Balancer]:
    """Run a balancer in front of the processes that listen on these ports."""
    running = Balancer(ports)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
