"""Safe by default: what may be listened on, and what is said when it may not."""

import itertools

import pytest
from latchkey_service.config import ConfigError, load
from latchkey_service.exposure import is_local, reflects

LOCAL = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/run/x.sock"]
ELSEWHERE = ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.example.org:1"]
TLS = {"TLS_LISTEN": "0.0.0.0:2", "TLS_CERTIFICATE": "/c", "TLS_KEY": "/k"}


def settings(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"LATCHKEY_{name}", value)
    return load()


@pytest.mark.parametrize("listen", LOCAL + ELSEWHERE)
def test_what_is_local(listen):
    """Loopback addresses and UNIX sockets are, and no name but localhost."""
    assert is_local(listen) == (listen in LOCAL)


@pytest.mark.parametrize(
    ("listen", "policy", "insecure"),
    list(
        itertools.product([*LOCAL, *ELSEWHERE], [False, True], ["none", "plaintext", "anonymous"])
    ),
)
def test_plaintext(monkeypatch, listen, policy, insecure):
    """Elsewhere only for those who have said so, with a policy by one word and without by another.
    The word for without is refused with one wherever: who drops the policy opens nothing by it."""
    values = {"LISTEN": listen, "INSECURE_LISTEN": insecure} | ({"POLICY": "/p"} if policy else {})
    confused = policy and insecure == "anonymous"
    wanted = "plaintext" if policy else "anonymous"
    if not confused and (listen in LOCAL or insecure == wanted):
        assert settings(monkeypatch, **values).listen == listen
        return
    about = "INSECURE_LISTEN" if confused else "LISTEN"
    with pytest.raises(ConfigError, match=rf"^LATCHKEY_{about}: ") as caught:
        settings(monkeypatch, **values)
    said = str(caught.value)
    assert f"LATCHKEY_INSECURE_LISTEN={wanted} where" in said
    assert "keep LATCHKEY_LISTEN on 127.0.0.1" in said
    assert confused or "LATCHKEY_TLS_LISTEN" in said
    # One mistake, told once.
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (TLS, "TLS_LISTEN: .* LATCHKEY_POLICY"),
        ({"TLS_LISTEN": "0.0.0.0:2", "POLICY": "/p"}, "TLS_CERTIFICATE: is required"),
        ({**TLS, "POLICY": "/p", "TLS_KEY": ""}, "TLS_KEY: is required"),
        ({**TLS, "POLICY": "/p", "TLS_LISTEN": "unix:/x"}, "TLS_LISTEN: give HOST:PORT"),
        ({**TLS, "TLS_LISTEN": "127.0.0.1:50051"}, "TLS_LISTEN: is the same address"),
        ({"TLS_KEY": "/k"}, "TLS_KEY: is of no use"),
        ({"TRUSTED_PROXY": "spiffe://a/b"}, "TRUSTED_PROXY: without LATCHKEY_POLICY"),
        (
            {
                "TRUSTED_PROXY": "spiffe://a/b",
                "POLICY": "/p",
                "LISTEN": "0.0.0.0:1",
                "INSECURE_LISTEN": "plaintext",
            },
            "TRUSTED_PROXY: a proxy is believed on a UNIX socket or on loopback only",
        ),
        ({"TRUSTED_PROXY": "envoy", "POLICY": "/p"}, "TRUSTED_PROXY: "),
        ({"TRUSTED_PROXY": "spiffe://a/b=c", "POLICY": "/p"}, "TRUSTED_PROXY: "),
        ({"WORKERS": "2", "LISTEN": "unix:/x"}, "WORKERS: "),
    ],
)
def test_what_does_not_go_together(monkeypatch, values, named):
    """Settings that make no sense together are refused, under the name of one of them."""
    with pytest.raises(ConfigError, match=f"(?m)^LATCHKEY_{named}"):
        settings(monkeypatch, **values)


def test_what_does(monkeypatch):
    """TLS elsewhere with a policy; and on loopback without one, to try it."""
    assert settings(monkeypatch, **TLS, POLICY="/p").tls_listen == TLS["TLS_LISTEN"]
    monkeypatch.delenv("LATCHKEY_POLICY")
    assert settings(monkeypatch, **(TLS | {"TLS_LISTEN": "[::1]:2"})).tls_listen == "[::1]:2"


@pytest.mark.parametrize("reflection", ["auto", "on", "off"])
def test_reflection(monkeypatch, reflection):
    """By itself on local listeners alone, and not on one that a proxy leads to."""
    here = settings(monkeypatch, REFLECTION=reflection, POLICY="/p")
    assert reflects(here, "127.0.0.1:1") == (reflection != "off")
    assert reflects(here, "0.0.0.0:1") == (reflection == "on")
    proxied = settings(monkeypatch, TRUSTED_PROXY="spiffe://a/envoy")
    assert reflects(proxied, "unix:/x") == (reflection == "on")
