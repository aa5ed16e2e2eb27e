"""Runs the page: binds its address, says where it is, serves until SIGINT, SIGTERM or SIGHUP."""

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

from latchkey_console.app import make_app
from latchkey_console.settings import Settings, SettingsError

__all__ = ["run", "stopping_signals"]

# Requests at once, each of which may wait for Latchkey; more are told 503.
REQUESTS_MAX: Final = 500
# A Delete that waits for a silent verifier takes some seconds.
GRACE_SECONDS: Final = 10
MARGIN_SECONDS: Final = 2
KEEP_ALIVE_SECONDS: Final = 15
BACKLOG: Final = 512


def run(settings: Settings) -> None:
    """Serve the page, on the main thread. Raises SettingsError when its address cannot be had."""
    with _bound(settings) as listener:
        settings = _with_port(settings, listener.getsockname()[1])
        _log_to_stderr()
        # One process: forms and new secrets are kept in its memory.
        config = uvicorn.Config(
            make_app(settings),
            workers=1,
            # The peer's address is taken as it is: `identity` trusts it and no header.
            proxy_headers=False,
            server_header=False,
            # Its lines would have queries in them. What is done is logged by the page itself.
            access_log=False,
            log_config=None,
            ws="none",
            limit_concurrency=REQUESTS_MAX,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = _Server(config)
        # From before it says that it is up: uvicorn listens to signals once its loop runs.
        for number in stopping_signals():
            signal.signal(number, server.handle_exit)
        sys.stdout.write(
            f"API Tokens: {settings.public_url} ({_whose(settings)}). Ctrl-C stops it.\n"
        )
        sys.stdout.flush()
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends in order however often it is told to, which takes GRACE_SECONDS."""

    _end: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note that it is to end, and no more, until it should have ended by far.

        uvicorn raises signals again, for its caller, when it has ended, which here is to go on. At
        a second Ctrl-C it drops what is under way, such as the answer to a Delete, and logs each of
        that as a fault. A handler that raises would do so in whatever code runs, some of which goes
        on or fails. But after its time something hangs, and whoever insists is to be obeyed.
        """
        self.should_exit = True
        if self._end is None:
            self._end = time.monotonic() + GRACE_SECONDS + MARGIN_SECONDS
        elif time.monotonic() > self._end:
            raise KeyboardInterrupt


def stopping_signals() -> list[signal.Signals]:
    """Return what ends the page in order: a closed terminal too, unless nohup is to keep it."""
    kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if kept else [signal.SIGHUP])]


def _bound(settings: Settings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # what no name can look like is a UnicodeError
        where = f"{settings.host}:{settings.port}"
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise SettingsError(f"--listen: {where} cannot be had: {reason}; choose another") from error


def _with_port(settings: Settings, port: int) -> Settings:
    """Return the settings with the port that port 0 has become."""
    if settings.port != 0:
        return settings
    public_url = settings.public_url
    if public_url.endswith(":0"):
        public_url = f"{public_url.removesuffix('0')}{port}"
    return replace(settings, port=port, public_url=public_url)


def _whose(settings: Settings) -> str:
    if settings.account is not None:
        return f"everyone here is account {settings.account}"
    if settings.proxy is not None:
        return f"accounts by header {settings.proxy.header}"
    return "sign-in with OpenID Connect"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_is_news)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("latchkey.console").setLevel(logging.INFO)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a record is more than the traceback of a request that was ended.

    How many were, when the grace was over, uvicorn has said in a line before.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
