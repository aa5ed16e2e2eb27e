"""`latchkey doctor` on servers that a test configures as their superuser: roles and standbys."""

from pathlib import Path

import pytest
from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.process.doctor import examine
from latchkey_service.process.finding import Finding

from tests.helpers.free_ports import free_port
from tests.helpers.postgres_node import Node, Template, lone_node


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pepper_file: Path) -> None:
    """The settings of a host, without the URL of its database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATCHKEY_PEPPER_FILE", str(pepper_file))
    monkeypatch.setenv("LATCHKEY_LISTEN", f"127.0.0.1:{free_port()}")


async def found(monkeypatch: pytest.MonkeyPatch, url: str, state: str) -> list[Finding]:
    """Return the findings in a state, with this database."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", url)
    return [finding for finding in await examine() if finding.state == state]


async def test_rights(node: Node, node_template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the tables causes a warning, a role with the service's rights is fine, and one
    that lacks a right causes a failure that names it."""
    await node.execute(f"CREATE ROLE service LOGIN PASSWORD '{node_template.password}'")
    await migrate(node.url, bundled(), service_role="service")
    (warning,) = (
        f for f in await found(monkeypatch, node.url, "warning") if f.check == "privileges"
    )
    assert "the owner of the tables" in warning.text
    service = node.url_at(node.address, role="service")
    assert await found(monkeypatch, service, "failure") == []
    assert "privileges" in {f.check for f in await found(monkeypatch, service, "ok")}
    await node.execute("REVOKE INSERT ON audit FROM service")
    await node.execute("REVOKE DELETE ON token FROM service")
    (failure,) = await found(monkeypatch, service, "failure")
    assert failure.check == "privileges"
    assert failure.text == "the role lacks INSERT ON audit; DELETE ON token"
    assert "latchkey migrate --grant" in failure.what_to_do


async def test_unsafe_settings(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that may lose commits causes a warning, and one whose commits wait for a missing
    standby causes a failure."""
    await migrate(node.url, bundled())
    warnings = await found(monkeypatch, node.url, "warning")
    assert any(f.check == "durability" and "fsync is off" in f.text for f in warnings)
    node.configure(synchronous_standby_names="other")
    await node.execute("SELECT pg_reload_conf()")
    (failure,) = await found(monkeypatch, node.url, "failure")
    assert failure.check == "durability"
    assert "synchronous standby" in failure.text


async def test_standbys(
    node: Node, scratch: Path, node_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby alone causes a failure. Beside its primary it is fine, but two primaries are
    not."""
    await migrate(node.url, bundled())
    async with lone_node(scratch, node_template) as other:
        both = node.url_at(node.address, other.address)
        (failure,) = await found(monkeypatch, both, "failure")
        assert "several hosts say that they are the primary" in failure.text
        await other.stop()
        (other.data / "standby.signal").touch()
        await other.start()
        (failure,) = await found(monkeypatch, other.url, "failure")
        assert failure.text == f"{other.address} is a standby"
        assert "promote it" in failure.what_to_do
        assert await found(monkeypatch, both, "failure") == []
