"""Turns a request that does not parse into a value, so that our own error answers it."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.lenient_parsing import parse_non_utf8

__all__ = ["InvalidRequest", "parser", "request_not_parsed", "require_parsed"]


@dataclass(frozen=True, slots=True)
class InvalidRequest:
    """Stands for a request that does not parse. If the parser's exception propagated, the transport
    would answer instead of us, and one of the two would answer UNKNOWN."""


def parser(path: str, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Wrap `parse` so that it returns InvalidRequest instead of raising."""
    if parse is None:
        raise ValueError(f"{path} has no parser")

    def safely(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # noqa: BLE001 - the bytes may raise anything in the parser
            return parse_non_utf8(path, data) or InvalidRequest()

    return safely


def require_parsed(request: Any) -> Any:
    """Return a valid request, or a stream that raises at the first invalid one."""
    if request.__class__ is InvalidRequest:
        raise request_not_parsed()
    return _each_parsed(request) if isinstance(request, AsyncIterator) else request


def request_not_parsed() -> InvalidArgument:
    """Return a new error each time: raising the same one again would keep its tracebacks alive."""
    return InvalidArgument(
        FieldViolation("", "the request is not a message of this method's type"),
        reason="REQUEST_NOT_PARSED",
    )


async def _each_parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield require_parsed(request)
