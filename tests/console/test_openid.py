"""Sign-in with a real OpenID provider in a real browser, and forged sign-in answers."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.console import tools
from tests.console.browsing import Browser
from tests.console.conftest import World
from tests.console.processes import Console, console
from tests.helpers.free_ports import free_port
from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.waiting import WAIT_SECONDS

pytestmark = pytest.mark.xdist_group("browser")

SECRET = "a client secret"


@contextmanager
def provider(page: str, *arguments: str) -> Iterator[str]:
    """Run the provider for a console at this address. Yield its issuer."""
    modules = tools.npm_packages()
    script = Path(__file__).parent / "npm/provider.mjs"
    process = subprocess.Popen(
        ["node", str(script), str(modules), page, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        issuer = process.stdout.readline().strip()
        assert issuer, process.stderr.read()
        yield issuer
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_SECONDS)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def signed(backend: tuple, scratch: Path) -> Iterator[tuple[Console, str, str]]:
    """A console with OpenID sign-in as a confidential client: process, URL and issuer."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    secret_file = scratch / "client-secret"
    secret_file.write_text(SECRET + "\n")
    with provider(url, SECRET) as issuer:
        arguments = (
            *("--listen", f"127.0.0.1:{port}", "--target", backend[0].address),
            *("--oidc-issuer", issuer, "--oidc-client-id", "page"),
            *("--oidc-client-secret-file", str(secret_file)),
        )
        with console(scratch / "page-openid", *arguments) as (running, address):
            yield running, address, issuer


def sign_in(browser: Browser, name: str) -> None:
    """Sign in on the provider's pages."""
    browser.send("[name=login]", name)
    browser.send("[name=password]", "any")
    browser.click("button[type=submit]")
    # The provider asks for consent once per account.
    consent = "[name=prompt][value=consent]"
    browser.until(lambda: browser.all(consent) or browser.all("#main"), "consent, or the page")
    if browser.all(consent):
        browser.click("button[type=submit]")
    browser.find("#main")
    # The provider's pages request a font that is unavailable.
    browser.console_errors()


def test_sign_in_and_out(
    browser: Browser, world: World, signed: tuple[Console, str, str], axe: str
) -> None:
    """After sign-in, users see the page they asked for with their account, until they sign out."""
    process, url, issuer = signed
    world.account = "alice"
    world.create("of alice")
    world.account = "bob"
    world.create("of bob")
    browser.reset(url, None)
    browser.open("/?q=of")
    assert browser.driver.current_url.startswith(issuer)
    sign_in(browser, "alice")
    assert browser.driver.current_url == f"{url}/?q=of"
    assert browser.text(".who bdi") == "alice"
    assert browser.text("#rows th bdi") == "of alice"
    browser.screen("signed-in")
    # A signed-in user can create a token.
    browser.click("#generate")
    browser.type("#name", "by alice")
    browser.click("#add")
    browser.find("#secret")
    browser.click("#stored")
    cookies = browser.cdp("Network.getAllCookies")["cookies"]
    cookie_name = f"latchkey-console-{httpx.URL(url).port}"
    session = next(c for c in cookies if c["name"] == cookie_name)
    assert (session["httpOnly"], session["sameSite"]) == (True, "Lax")

    browser.click(".who button")
    # The provider asks whether to end its own session.
    browser.click("[name=logout]")
    browser.until(
        lambda: browser.driver.current_url.startswith(f"{url}/signed-out"), "the signed-out page"
    )
    assert "You are signed out" in browser.text("main")
    browser.console_errors()
    browser.screen("signed-out")
    browser.accessible(axe, "the signed-out page")
    # A copy of the cookie is now worthless.
    with httpx.Client(cookies={cookie_name: session["value"]}) as thief:
        answer = thief.get(f"{url}/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    browser.driver.back()
    browser.until(lambda: "of alice" not in browser.driver.page_source, "the tokens disappear")

    browser.driver.get(f"{url}/signed-out")
    browser.click("main .button")
    sign_in(browser, "bob")
    assert browser.text("#rows th bdi") == "of bob"
    assert SECRET not in process.log


@pytest.mark.answers(403)
def test_invalid_account_claim_is_refused(
    browser: Browser, world: World, signed: tuple[Console, str, str]
) -> None:
    """If the claim is not a valid account id, the page says so and shows nothing."""
    _, url, _ = signed
    browser.reset(url, None)
    browser.open()
    sign_in(browser, "Jane Doe")
    assert "Invalid account ID" in browser.text("main")


@pytest.mark.answers(401)
def test_input_survives_an_expired_sign_in(
    browser: Browser, world: World, signed: tuple[Console, str, str], script: bool
) -> None:
    """A form submitted after the sign-in expired creates nothing and keeps its input."""
    _, url, _ = signed
    browser.reset(url, None)
    browser.open("/new")
    sign_in(browser, "carol")
    browser.scripts(on=script)
    browser.open("/new")
    browser.type("#name", "half done")
    browser.click("dialog [value=write]")
    browser.cdp("Network.clearBrowserCookies")
    browser.click("#add")
    if script:
        assert "no longer signed in" in browser.text("dialog #message")
        assert browser.find("#name").get_attribute("value") == "half done"
        browser.click("#message a")
    else:
        assert "no longer signed in" in browser.text("main")
        browser.click("main .button")
    browser.scripts(on=True)
    sign_in(browser, "carol")
    assert browser.find("#name").get_attribute("value") == "half done"
    assert browser.find("dialog [value=write]").is_selected()
    world.account = "carol"
    assert world.tokens() == {}


def begin(client: httpx.Client, url: str) -> dict[str, str]:
    """Start a sign-in and return the parameters sent to the provider."""
    answer = client.get(f"{url}/sign-in")
    assert answer.status_code == 302
    query = parse_qs(urlsplit(answer.headers["location"]).query)
    return {name: values[0] for name, values in query.items()}


def test_request_to_the_provider(signed: tuple[Console, str, str]) -> None:
    """Each sign-in has a new state, nonce and PKCE challenge."""
    _, url, _ = signed
    with httpx.Client(verify=NO_AUTHORITIES) as client:
        first, second = begin(client, url), begin(client, url)
    for asked in (first, second):
        assert asked["response_type"] == "code"
        assert asked["scope"] == "openid"
        assert asked["code_challenge_method"] == "S256"
        assert asked["redirect_uri"] == f"{url}/signed-in"
        assert SECRET not in str(asked)
    for name in ("state", "nonce", "code_challenge"):
        assert len(first[name]) >= 20
        assert first[name] != second[name]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?code=x",
        "?code=x&state=guessed",
        "?code=x&state={state}",
        "?code=x&state={state}&iss=https://evil.example",
        "?error=access_denied&state={state}",
        "?error=access_denied",
        "?state={state}",
    ],
)
def test_invalid_answers_sign_nobody_in(signed: tuple[Console, str, str], query: str) -> None:
    """A missing or foreign state, a forged code, another issuer or a refusal signs nobody in."""
    process, url, _ = signed
    with httpx.Client(verify=NO_AUTHORITIES) as client:
        asked = begin(client, url)
        answer = client.get(f"{url}/signed-in{query.format(**asked)}")
        assert answer.status_code == 400
        assert "Sign-in failed" in answer.text
        assert "guessed" not in answer.text
        assert client.get(f"{url}/").headers["location"] == "/sign-in"
    # Another browser's state is rejected, so nobody can be signed in as someone else.
    with httpx.Client(verify=NO_AUTHORITIES) as victim:
        victim.get(f"{url}/")
        answer = victim.get(f"{url}/signed-in?code=x&state={asked['state']}")
        assert answer.status_code == 400
    assert "Traceback" not in process.log


def test_sign_out_requires_the_seal(signed: tuple[Console, str, str]) -> None:
    """Signing out requires a form of our page, so other sites cannot sign a user out."""
    _, url, _ = signed
    assert httpx.get(f"{url}/sign-out").status_code == 405
    assert httpx.post(f"{url}/sign-out").status_code == 403


def test_public_client_and_another_claim(
    browser: Browser, world: World, backend: tuple, scratch: Path
) -> None:
    """Without a client secret, PKCE suffices. The account can come from any claim."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with provider(url) as issuer:
        arguments = (
            *("--listen", f"127.0.0.1:{port}", "--target", backend[0].address),
            *("--oidc-issuer", issuer, "--oidc-client-id", "page", "--oidc-claim", "tenant"),
        )
        with console(scratch / "page-public", *arguments):
            browser.reset(url, None)
            browser.open()
            sign_in(browser, "dave")
            assert browser.text(".who bdi") == "tenant-of-dave"


@pytest.mark.answers(503)
def test_unavailable_provider(
    browser: Browser, world: World, backend: tuple, scratch: Path, axe: str
) -> None:
    """While the provider is down, the page says that sign-in is unavailable and shows nothing."""
    arguments = (
        *("--target", backend[0].address),
        *("--oidc-issuer", f"http://127.0.0.1:{free_port()}", "--oidc-client-id", "page"),
    )
    with console(scratch / "page-away", *arguments) as (running, url):
        browser.reset(url, None)
        browser.open()
        assert "Sign-in is not available" in browser.text("main")
        browser.screen("no-provider")
        browser.accessible(axe, "no sign-in")
        assert re.search(r"sign-in failed: provider unavailable", running.log)
        assert "Traceback" not in running.log
