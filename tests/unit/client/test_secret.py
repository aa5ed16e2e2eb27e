"""Secrets that cannot be printed by mistake."""

import copy
import dataclasses
import json
import logging
import pickle
import traceback

import pytest
from latchkey import CreatedToken, Secret
from latchkey._shape import redact

TEXT = "lk" + "_" + "S3cr3t" * 9 + "abc"


def test_no_way_of_showing_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    """repr, str, format, %, f-strings, containers, logs and tracebacks print a placeholder."""
    secret = Secret(TEXT)
    logging.getLogger("test").warning("%s %r %s", secret, secret, [secret])
    try:
        raise RuntimeError(secret)
    except RuntimeError as error:
        shown = "".join(traceback.format_exception(error))
    created = dataclasses.make_dataclass("Holder", ["secret"])(secret)
    for text in (
        repr(secret),
        str(secret),
        f"{secret} {secret!s} {secret!r} {secret:>80}",
        "%s %r" % (secret, secret),  # noqa: UP031 - this very way is under test
        "{}".format(secret),  # noqa: UP032 - this very way is under test
        repr({"a": (secret,)}),
        repr(created),
        caplog.text,
        shown,
    ):
        assert "S3cr3t" not in text
        assert "lk_…(redacted)" in text
    assert "secret" in {field.name for field in dataclasses.fields(CreatedToken)}


@pytest.mark.parametrize(
    "text",
    ["", "hunter2", "lk", "…(redacted)x", "x y " + TEXT, TEXT + " " + TEXT, "hunter2_" + TEXT],
)
def test_odd_texts_are_hidden_whole(text: str) -> None:
    """What has no secret's shape has no prefix worth showing either."""
    assert str(Secret(text)) == "…(redacted)"


def test_reveal_is_the_way_in() -> None:
    """The text comes out on request, unchanged."""
    assert Secret(TEXT).reveal() == TEXT


def test_pickling_is_refused() -> None:
    """A secret does not slip into caches, queues or other processes."""
    with pytest.raises(TypeError, match="not pickled") as caught:
        pickle.dumps(Secret(TEXT))
    assert "S3cr3t" not in str(caught.value)
    with pytest.raises(TypeError):
        json.dumps({"secret": Secret(TEXT)})


def test_copies_are_the_secret_itself() -> None:
    """Copying needs no pickling, so that dataclasses.asdict() works, and reveals nothing."""
    secret = Secret(TEXT)
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_equality_is_by_text_and_type() -> None:
    """Equal texts are equal secrets; a str is not a secret; no hash is offered."""
    assert Secret(TEXT) == Secret(TEXT)
    assert Secret(TEXT) != Secret(TEXT + "x")
    assert Secret(TEXT) != TEXT
    assert Secret("\ud800") == Secret("\ud800")
    with pytest.raises(TypeError, match="unhashable"):
        hash(Secret(TEXT))


def test_it_cannot_be_changed_or_made_of_anything_else() -> None:
    """A secret is immutable, and a wrong type is refused without showing the value."""
    secret = Secret(TEXT)
    with pytest.raises(AttributeError):
        secret.text = "x"
    with pytest.raises(TypeError) as caught:
        Secret(TEXT.encode())  # type: ignore[arg-type]  # the point of the test
    assert "S3cr3t" not in str(caught.value)
    assert not hasattr(secret, "__dict__")


def test_redaction_takes_longer_runs_too() -> None:
    """A secret with more characters stuck to its end is still redacted."""
    assert redact(f"a {TEXT}xyz b") == "a lk_…(redacted) b"
