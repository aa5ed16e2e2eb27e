"""Runs the console: binds its address, prints its URL, serves until SIGINT, SIGTERM or SIGHUP."""

import asyncio
import logging
import signal
import socket
import sys
import time
from dataclasses import replace
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from latchkey_console.app import HEALTH, make_app
from latchkey_console.connections import Protocol, RequestLimit
from latchkey_console.settings import Settings, SettingsError

__all__ = ["bound", "run", "serve", "stopping_signals"]

# A Delete that waits for a silent verifier takes several seconds.
GRACE_SECONDS: Final = 10
MARGIN_SECONDS: Final = 2
KEEP_ALIVE_SECONDS: Final = 15
BACKLOG: Final = 512


def run(settings: Settings) -> None:
    """Serve the console on the main thread. Raises SettingsError if its address is unavailable."""
    with bound(settings.host, settings.port) as listener:
        settings = _with_port(settings, listener.getsockname()[1])
        app = RequestLimit(make_app(settings), frozenset({HEALTH}))
        greeting = f"API Tokens: {settings.home_url} ({_whose(settings)}). Ctrl-C stops it."
        serve(app, Protocol, listener, "latchkey.console", greeting)


def serve(
    app: ASGIApp, protocol: type[Protocol], listener: socket.socket, name: str, greeting: str
) -> None:
    """Serve an application on the main thread until a signal. Logs to standard error.

    The logger called `name` also shows information, and not only warnings.
    """
    _log_to_stderr(name)
    # One process: the first signal stops it, and a load balancer can spread over several.
    config = uvicorn.Config(
        app,
        workers=1,
        http=protocol,
        # Keep the peer's real address: `identity` trusts it and ignores forwarding headers.
        proxy_headers=False,
        server_header=False,
        # The access log would contain queries. The console logs its own actions.
        access_log=False,
        log_config=None,
        ws="none",
        # It would count connections as requests. `RequestLimit` counts requests.
        limit_concurrency=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    # Installed before we print the URL: uvicorn handles signals only once its loop runs.
    for number in stopping_signals():
        signal.signal(number, server.handle_exit)
    sys.stdout.write(greeting + "\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Shuts down gracefully, within GRACE_SECONDS, however many signals arrive."""

    _end: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """Request the shutdown. Interrupt only after it should long have finished.

        This replaces uvicorn's handler for three reasons. uvicorn raises the signals again after
        its shutdown, but here the caller continues. On a second Ctrl-C, uvicorn drops requests in
        progress, such as the answer to a Delete, and logs each as an error. And a handler that
        raises would interrupt arbitrary code, some of which would ignore the exception or fail.
        Past the deadline, though, something hangs, so a further signal raises KeyboardInterrupt.
        """
        self.should_exit = True
        if self._end is None:
            self._end = time.monotonic() + GRACE_SECONDS + MARGIN_SECONDS
        elif time.monotonic() > self._end:
            raise KeyboardInterrupt


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that shut the console down. nohup keeps SIGHUP out of them."""
    kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if kept else [signal.SIGHUP])]


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises SettingsError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: not encodable as a host name
        where = f"{host}:{port}"
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise SettingsError(
            f"--listen: cannot listen on {where}: {reason}; choose another address"
        ) from error


def _with_port(settings: Settings, port: int) -> Settings:
    """Return the settings with the actual port in place of port 0."""
    if settings.port != 0:
        return settings
    public_url = settings.public_url
    if public_url.endswith(":0"):
        public_url = f"{public_url.removesuffix('0')}{port}"
    return replace(settings, port=port, public_url=public_url)


def _whose(settings: Settings) -> str:
    if settings.is_for_operators:
        return "the operators' view"
    if settings.account is not None:
        return f"everyone uses account {settings.account}"
    if settings.proxy is not None:
        return f"accounts from header {settings.proxy.header}"
    return "sign-in with OpenID Connect"


def _log_to_stderr(name: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_is_news)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(name).setLevel(logging.INFO)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a request that the shutdown cancelled.

    uvicorn has already logged the number of cancelled requests in one line.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
