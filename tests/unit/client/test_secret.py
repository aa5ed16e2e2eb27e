"""Secrets that cannot be printed by mistake."""

import copy
import dataclasses
import json
import logging
import pickle
import traceback

import pytest
from latchkey import CreatedToken, Secret

TEXT = "lk" + "_" + "S3cr3t" * 9 + "abc"


def test_secrets_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """repr, str, format, %, f-strings, containers, logs and tracebacks show a placeholder."""
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
        "%s %r" % (secret, secret),  # noqa: UP031 - tests this formatting
        "{}".format(secret),  # noqa: UP032 - tests this formatting
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
def test_other_texts_are_hidden_completely(text: str) -> None:
    """A text without a secret's format shows no prefix."""
    assert str(Secret(text)) == "…(redacted)"


def test_reveal_returns_the_text() -> None:
    """The text is returned unchanged."""
    assert Secret(TEXT).reveal() == TEXT


def test_pickling_is_refused() -> None:
    """A secret cannot reach caches, queues or other processes by pickling."""
    with pytest.raises(TypeError, match="cannot be pickled") as caught:
        pickle.dumps(Secret(TEXT))
    assert "S3cr3t" not in str(caught.value)
    with pytest.raises(TypeError):
        json.dumps({"secret": Secret(TEXT)})


def test_copies_work_without_pickling() -> None:
    """dataclasses.asdict() works, and copies reveal nothing."""
    secret = Secret(TEXT)
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_equality_is_by_text_and_type() -> None:
    """Secrets with equal texts are equal. A str never equals a Secret. Secrets have no hash."""
    assert Secret(TEXT) == Secret(TEXT)
    assert Secret(TEXT) != Secret(TEXT + "x")
    assert Secret(TEXT) != TEXT
    assert Secret("\ud800") == Secret("\ud800")
    with pytest.raises(TypeError, match="unhashable"):
        hash(Secret(TEXT))


def test_secrets_are_immutable_and_made_from_str() -> None:
    """Changes are refused. A wrong type is refused without showing the value."""
    secret = Secret(TEXT)
    with pytest.raises(AttributeError):
        secret.text = "x"
    with pytest.raises(TypeError) as caught:
        Secret(TEXT.encode())  # type: ignore[arg-type]  # the point of the test
    assert "S3cr3t" not in str(caught.value)
    assert not hasattr(secret, "__dict__")
