"""A real PgBouncer in front of an embedded Postgres, with the settings that a test gives it."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from latchkey_service.postgres.embedded_host import OsAccount, spawn

from tests.helpers.free_ports import free_port
from tests.helpers.programs import installed_by_apt
from tests.helpers.waiting import eventually

__all__ = ["PgBouncer", "program"]

# Debian installs it here, which is not in every user's PATH.
SBIN = "/usr/sbin"
END_SECONDS_MAX = 10.0


def program() -> str:
    """Return the path of PgBouncer; install it where possible."""

    def found() -> str | None:
        return shutil.which("pgbouncer") or shutil.which("pgbouncer", path=SBIN)

    installed_by_apt(lambda: found() is not None, ("pgbouncer",))
    return found() or ""


class PgBouncer:
    """One PgBouncer. `settings` go into its section [pgbouncer]."""

    def __init__(self, folder: Path, database_url: str, **settings: object) -> None:
        folder.mkdir()
        url = urlsplit(database_url)
        where = dict(parse_qsl(url.query))
        self._user, self._password = unquote(url.username or ""), unquote(url.password or "")
        self._database = url.path.removeprefix("/")
        self._server = f"host={where['host']} port={where.get('port', 5432)}"
        self._folder = folder
        self._port = free_port()
        # PgBouncer does not run as root, and only its owner can use Postgres' socket.
        owner = Path(where["host"]).stat()
        self._account = OsAccount(owner.st_uid, owner.st_gid)
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._write("users", f'"{self._user}" "{self._password}"\n')
        self._configure(settings)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def url(self, query: str = "", database: str | None = None) -> str:
        """Return the URL of the database through the pooler."""
        place = f"127.0.0.1:{self._port}/{self._database if database is None else database}"
        return f"postgresql://{self._user}:{self._password}@{place}?sslmode=disable{query}"

    async def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        argv = [program(), str(self._folder / "pgbouncer.ini")]
        with self._log.open("ab") as log:
            self._process = spawn(argv, self._account, log, signal.SIGKILL, {})
        await eventually(self._takes_connections, "PgBouncer takes connections")

    def stop(self) -> None:
        if self._process is not None:
            # Immediately, even with clients connected.
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(END_SECONDS_MAX)

    def _takes_connections(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _configure(self, settings: dict[str, object]) -> None:
        own: dict[str, object] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self._port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": self._folder / "users",
            "max_client_conn": 500,
            "default_pool_size": 60,
        }
        lines = [f"{name} = {value}" for name, value in (own | settings).items()]
        # For each database of the server.
        text = "\n".join(["[databases]", f"* = {self._server}", "[pgbouncer]", *lines, ""])
        self._write("pgbouncer.ini", text)

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.write_text(text)
        path.chmod(0o600)
        for each in (self._folder, path):
            os.chown(each, self._account.uid, self._account.gid)
