"""The headers `authorization` and x-forwarded-client-cert, with a real authenticator.

Each line of an input is a header, in order: a letter for the key, then the value, as latin-1 (which
accepts any bytes), or as bytes, as transports pass on values that are not text.
"""

import base64
import contextlib
import random
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, unquote

from latchkey_service.access import forwarded, policy
from latchkey_service.access.authenticator import ActivePolicy, Authenticator
from latchkey_service.access.credentials import bearer, digest_of, mint, policy_digest
from latchkey_service.errors import Denied
from latchkey_service.secret_format import Secret

from tests.fuzz.target import Finding, Target

PROXY = "spiffe://example.org/envoy"
SHOP = "spiffe://example.org/shop"
CREDENTIAL = mint(lambda size: bytes(range(size))).reveal()
VERIFY = "/latchkey.v1.TokenService/Verify"
POLICY = f"""
[callers.shop]
certificates = ["{SHOP}", "shop.internal"]
credentials = ["{policy_digest(Secret(CREDENTIAL))}"]
roles = ["verifier"]
[callers.till]
certificates = ["spiffe://example.org/till"]
roles = ["manager"]
"""
# With both of shop's names. The authenticator ignores its expiry.
CERTIFICATE = ssl.DER_cert_to_PEM_cert(
    base64.b64decode(
        "MIIBfTCCASKgAwIBAgIUeCzGH1k4xdj9jcJ7zNjCt9leaHowCgYIKoZIzj0EAwIwQDEXMBUGA1UE"
        "CgwOdHJ1c3RtZSB2MS4yLjExJTAjBgNVBAsMHFRlc3RpbmcgQ0EgI3lhY0xKaHVFU3hrWXVrWksw"
        "HhcNMjYxMTIzMDExMzA3WhcNMjYxMTI2MDExMzA3WjAAMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD"
        "QgAEhYUnsyMVkY94s1ydn7rEh7ClDNtZoRPODmEfv9ekyh6sO0sUHg1ljVe9GGkVa+Kl+ltyJEwU"
        "j8kJ3xj9F581g6M6MDgwNgYDVR0RAQH/BCwwKoYZc3BpZmZlOi8vZXhhbXBsZS5vcmcvc2hvcIIN"
        "c2hvcC5pbnRlcm5hbDAKBggqhkjOPQQDAgNJADBGAiEA/6rEa9WBnli7AxcA7taAxfJFU3TKvZCV"
        "Z8Y2eLJjsQgCIQCrdfNNBZnuC32d1B6Sry7eWIV9u2xoXBo+65PdfSXOow=="
    )
)
CERT = f'Cert="{quote(CERTIFICATE, safe="")}"'
KEYS = {"a": "authorization", "x": forwarded.HEADER, "o": "x-other"}
PIECES = (
    "a", "x", "o", "b", f"aBearer {CREDENTIAL}", f"xBy={PROXY};URI={SHOP}",
    "bearer ", CREDENTIAL, ";", ",",
    '"', "\\", '\\"', "=", "By=", "URI=", "Hash=", "DNS=shop.internal", f"Hash=1;By={PROXY}", SHOP,
    'Subject="CN=a,b;c\\"d"', "spiffe://example.org/till", " ", "\t", "\x0b", "\r", "\xff", "\x1c",
    "x" * 300, CERT, "%00", "MIIB",
)  # fmt: skip


class Headers(Target):
    """Metadata of one call, at the authenticator of a listener that trusts a proxy."""

    length_max = 2_048
    mutates = True

    def __init__(self) -> None:
        self._policy = policy.parse(POLICY)
        self._active_policy = ActivePolicy(self._policy)

    def seeds(self) -> Iterable[bytes]:
        element = f'By={PROXY};Hash=1;Subject="CN=a,O=\\"b\\"";URI={SHOP};DNS=shop.internal'
        for text in (
            f"aBearer {CREDENTIAL}",
            f"x{element}",
            f"xBy=spiffe://other/p;URI=spiffe://example.org/till,{element}",
            f"xBy={PROXY};Hash=1;{CERT}",
            f"xBy={PROXY};{CERT};URI=spiffe://example.org/till",
            f"xBy={PROXY}",
            f"aBearer {CREDENTIAL}\nx{element}\noother",
        ):
            yield text.encode("latin-1")

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        text = data.decode("latin-1")
        place = chance.randint(0, len(text))
        match chance.randrange(4):
            case 0:
                text = text[:place] + chance.choice(PIECES) + text[place:]
            case 1:
                text = text[:place] + text[place + chance.randint(1, 4) :]
            case 2:
                text += "\n" + chance.choice(PIECES)
            case _:
                lines = text.split("\n")
                chance.shuffle(lines)
                text = "\n".join(lines[: chance.randint(1, 6)])
        return text.encode("latin-1")

    def one(self, data: bytes) -> None:
        metadata: list[tuple[str, Any]] = []
        for line in data.split(b"\n"):
            key = KEYS.get(line[:1].decode("latin-1"))
            if key is None:
                metadata.append(("authorization", line[1:]))
            else:
                metadata.append((key, line[1:].decode("latin-1")))
        self._parts(metadata)
        # A new authenticator, because its cache of headers must not depend on earlier inputs.
        authenticator = Authenticator(
            self._active_policy, proxy=PROXY, metadata_of=lambda context: context
        )
        call: Any = metadata
        outcomes = []
        for _ in range(2):
            try:
                outcomes.append(authenticator.authorize(VERIFY, call).name)
            except Denied as error:
                if CREDENTIAL in str(error):
                    raise Finding("an error contains a credential") from None
                outcomes.append(error.reason)
        if outcomes[0] != outcomes[1]:
            raise Finding(f"the second answer differs: {outcomes[1]} and not {outcomes[0]}")
        if outcomes[0] == "shop" and not _is_shop(metadata):
            raise Finding("accepted as shop, without its credential or name in the call")
        if outcomes[0] == "till":
            raise Finding("allowed to call a method that the caller's role does not include")

    def _parts(self, metadata: list[tuple[str, Any]]) -> None:
        """Attack the parsers directly, where the authenticator would reject an input first."""
        for key, value in metadata:
            if key == "authorization":
                with contextlib.suppress(Denied):
                    digest_of(bearer(value))
            elif key == forwarded.HEADER:
                try:
                    forwarded.parse(value)
                except forwarded.ForwardedError as error:
                    if error.args:
                        raise Finding("ForwardedError carries data") from None


def _is_shop(metadata: list[tuple[str, Any]]) -> bool:
    """Return whether a call can be from shop: by its credential, or by name through the proxy."""
    values = [(key, value) for key, value in metadata if isinstance(value, str)]
    # White space around a credential is not part of it.
    if any(
        key == "authorization" and value[7:].strip(" \t") == CREDENTIAL for key, value in values
    ):
        return True
    headers = [value.replace("\\", "") for key, value in values if key == forwarded.HEADER]
    if len(headers) != 1 or PROXY not in headers[0]:
        return False
    names = (f"URI={SHOP}", "DNS=shop.internal")
    if any(name.lower() in headers[0].replace('"', "").lower() for name in names):
        return True
    _, begin, pem = unquote(headers[0]).partition("-----BEGIN CERTIFICATE-----")
    # As it is parsed: without the characters that are not base64.
    return begin != "" and b"shop" in base64.b64decode(pem.partition("-----END")[0]).lower()


TARGET = Headers
