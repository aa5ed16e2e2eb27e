"""Requests that are no messages: a value, and not the parser's exception, so that we answer."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.lenient import lenient_parse

__all__ = ["Unparsed", "checked", "not_a_message", "parser"]


@dataclass(frozen=True, slots=True)
class Unparsed:
    """Stands for a request that is not the message it should be. Both transports would answer
    for us, one of them with UNKNOWN, were the parser's exception let through."""


def parser(path: str, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return `parse`, made not to raise."""
    if parse is None:
        raise ValueError(f"{path} has no parser")

    def safely(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # noqa: BLE001 - whatever the bytes do to the parser
            return lenient_parse(path, data) or Unparsed()

    return safely


def checked(request: Any) -> Any:
    """Return a stream's request, or its stream of requests, which raises at one that is none."""
    if request.__class__ is Unparsed:
        raise not_a_message()
    return _all_checked(request) if isinstance(request, AsyncIterator) else request


def not_a_message() -> InvalidArgument:
    """Return a new error each time: one that is raised again keeps all its tracebacks alive."""
    return InvalidArgument(
        FieldViolation("", "the request is not a message of this method's type"),
        reason="REQUEST_NOT_PARSED",
    )


async def _all_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield checked(request)
