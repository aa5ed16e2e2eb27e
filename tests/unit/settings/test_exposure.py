"""Safe defaults: which addresses may be listened on, and the errors for the others."""

import itertools

import pytest
from latchkey_service.settings.addresses import is_local
from latchkey_service.settings.exposure import reflects
from latchkey_service.settings.loading import ConfigError, load

LOCAL = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/run/x.sock"]
ELSEWHERE = ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.example.org:1"]
TLS = {"TLS_LISTEN": "0.0.0.0:2", "TLS_CERTIFICATE": "/c", "TLS_KEY": "/k"}


def settings(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"LATCHKEY_{name}", value)
    return load()


@pytest.mark.parametrize("listen", LOCAL + ELSEWHERE)
def test_local_addresses(listen):
    """Loopback addresses, UNIX sockets and the name localhost are local; other names are not."""
    assert is_local(listen) == (listen in LOCAL)


@pytest.mark.parametrize(
    ("listen", "policy", "insecure"),
    list(
        itertools.product([*LOCAL, *ELSEWHERE], [False, True], ["none", "plaintext", "anonymous"])
    ),
)
def test_plaintext(monkeypatch, listen, policy, insecure):
    """A plaintext address that is not local requires INSECURE_LISTEN: `plaintext` with a policy, or
    `anonymous` without one. `anonymous` with a policy is an error, so that removing the policy does
    not open the service."""
    values = {"LISTEN": listen, "INSECURE_LISTEN": insecure} | ({"POLICY": "/p"} if policy else {})
    confused = policy and insecure == "anonymous"
    wanted = "plaintext" if policy else "anonymous"
    if not confused and (listen in LOCAL or insecure == wanted):
        assert settings(monkeypatch, **values).listen == listen
        return
    about = "INSECURE_LISTEN" if confused else "LISTEN"
    with pytest.raises(ConfigError, match=rf"^LATCHKEY_{about}: ") as caught:
        settings(monkeypatch, **values)
    message = str(caught.value)
    assert f"LATCHKEY_INSECURE_LISTEN={wanted}" in message
    assert "keep LATCHKEY_LISTEN on 127.0.0.1" in message
    assert confused or "LATCHKEY_TLS_LISTEN" in message
    # One mistake is one line.
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (TLS, "TLS_LISTEN: .* LATCHKEY_POLICY"),
        ({"TLS_LISTEN": "0.0.0.0:2", "POLICY": "/p"}, "TLS_CERTIFICATE: is required"),
        ({**TLS, "POLICY": "/p", "TLS_KEY": ""}, "TLS_KEY: is required"),
        ({**TLS, "POLICY": "/p", "TLS_LISTEN": "unix:/x"}, "TLS_LISTEN: must be HOST:PORT"),
        ({"METRICS_LISTEN": "unix:/x"}, "METRICS_LISTEN: must be HOST:PORT"),
        ({"METRICS_LISTEN": "127.0.0.1:50051"}, "METRICS_LISTEN: is the same address"),
        ({**TLS, "TLS_LISTEN": "127.0.0.1:50051"}, "TLS_LISTEN: is the same address"),
        ({"TLS_KEY": "/k"}, "TLS_KEY: has no effect"),
        ({"TRUSTED_PROXY": "spiffe://a/b"}, "TRUSTED_PROXY: has no effect without LATCHKEY_POLICY"),
        (
            {
                "TRUSTED_PROXY": "spiffe://a/b",
                "POLICY": "/p",
                "LISTEN": "0.0.0.0:1",
                "INSECURE_LISTEN": "plaintext",
            },
            "TRUSTED_PROXY: requires LATCHKEY_LISTEN on a UNIX socket",
        ),
        ({"TRUSTED_PROXY": "envoy", "POLICY": "/p"}, "TRUSTED_PROXY: "),
        ({"TRUSTED_PROXY": "spiffe://a/b=c", "POLICY": "/p"}, "TRUSTED_PROXY: "),
        ({"WORKERS": "2", "LISTEN": "unix:/x"}, "WORKERS: "),
    ],
)
def test_contradictory_settings_are_rejected(monkeypatch, values, named):
    """Settings that contradict each other are an error under the name of one of them."""
    with pytest.raises(ConfigError, match=f"(?m)^LATCHKEY_{named}"):
        settings(monkeypatch, **values)


def test_valid_combinations(monkeypatch):
    """TLS works on any address with a policy, and on loopback without one, for experiments."""
    assert settings(monkeypatch, **TLS, POLICY="/p").tls_listen == TLS["TLS_LISTEN"]
    monkeypatch.delenv("LATCHKEY_POLICY")
    assert settings(monkeypatch, **(TLS | {"TLS_LISTEN": "[::1]:2"})).tls_listen == "[::1]:2"


@pytest.mark.parametrize("reflection", ["auto", "on", "off"])
def test_reflection(monkeypatch, reflection):
    """By default, only local listeners without a proxy serve reflection."""
    here = settings(monkeypatch, REFLECTION=reflection, POLICY="/p")
    assert reflects(here, "127.0.0.1:1") == (reflection != "off")
    assert reflects(here, "0.0.0.0:1") == (reflection == "on")
    proxied = settings(monkeypatch, TRUSTED_PROXY="spiffe://a/envoy")
    assert reflects(proxied, "unix:/x") == (reflection == "on")
