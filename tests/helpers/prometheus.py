"""A real Prometheus that scrapes a service, and promtool, which checks rules."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.free_ports import free_port
from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.programs import installed_by_apt, run
from tests.helpers.waiting import WAIT_SECONDS, eventually

__all__ = ["ALERTS", "JOB", "Prometheus", "promtool"]

JOB = "latchkey"
ALERTS = Path(__file__).parents[2] / "deploy/prometheus/alerts.yml"
# Short, so that rates have values after a few seconds.
SCRAPE_SECONDS = 1
# Testing the rules takes six seconds of processor time. A busy machine may need twenty times as
# long. The limit only ends a promtool that hangs.
PROMTOOL_SECONDS = 180.0
END_SECONDS_MAX = 10.0


def _install() -> None:
    # Debian's package has both programs.
    installed_by_apt(lambda: all(map(shutil.which, ("prometheus", "promtool"))), ("prometheus",))


def promtool(*arguments: str) -> tuple[int, str]:
    """Run promtool, and return its exit code and output; install it where possible."""
    _install()
    # Collecting garbage less often saves a third of its processor time.
    variables = {"PATH": "/usr/bin:/usr/local/bin", "GOGC": "400"}
    return run(("promtool", *arguments), PROMTOOL_SECONDS, variables)


class Prometheus:
    """One Prometheus with the project's alerts, which scrapes `targets`."""

    def __init__(self, folder: Path, *targets: str) -> None:
        _install()
        folder.mkdir()
        config = folder / "prometheus.yml"
        config.write_text(
            f"global: {{scrape_interval: {SCRAPE_SECONDS}s, evaluation_interval: 1s}}\n"
            f"rule_files: [{ALERTS}]\n"
            "scrape_configs:\n"
            f"  - job_name: {JOB}\n"
            f"    static_configs: [{{targets: [{', '.join(targets)}]}}]\n"
        )
        self._address = f"127.0.0.1:{free_port()}"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self._address}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )

    async def start(self) -> None:
        """Wait until it answers."""

        async def ready() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            try:
                return await self._get("/-/ready") is not None
            except httpx.HTTPError:
                return False

        await eventually(ready, "Prometheus is ready")

    async def query(self, expression: str) -> list[Any]:
        """Return the result of an instant query; a scalar as a list with one value."""
        response = await self._get("/api/v1/query", query=expression)
        answer = response.json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        found: list[Any] = answer["data"]["result"]
        return found

    async def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health and state."""
        groups = (await self._get("/api/v1/rules")).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS_MAX)

    async def _get(self, path: str, **parameters: str) -> httpx.Response:
        async with httpx.AsyncClient(
            timeout=WAIT_SECONDS, trust_env=False, verify=NO_AUTHORITIES
        ) as client:
            response = await client.get(f"http://{self._address}{path}", params=parameters)
        assert response.status_code in {200, 400, 422}, response.text
        return response
