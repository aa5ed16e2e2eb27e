"""Converts filters and orders to protobuf."""

from collections.abc import Mapping
from typing import Final

from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey import _convert
from latchkey.errors import FailedPrecondition, invalid
from latchkey.filters import TokenFilter, TokenOrder, TokenState

__all__ = ["NOT_APPLIED", "check_applied", "filter_out", "order_out"]

# The reason of the error if a server ignored a filter or an order.
NOT_APPLIED: Final = "FILTER_NOT_APPLIED"
_STATES_OUT: Final[Mapping[TokenState, pb.TokenState.ValueType]] = {
    TokenState.ACTIVE: pb.TOKEN_STATE_ACTIVE,
    TokenState.DISABLED: pb.TOKEN_STATE_DISABLED,
    TokenState.EXPIRED: pb.TOKEN_STATE_EXPIRED,
}
_ORDERS_OUT: Final[Mapping[TokenOrder, pb.TokenOrder.ValueType]] = {
    TokenOrder.NEWEST: pb.TOKEN_ORDER_NEWEST,
    TokenOrder.EXPIRY: pb.TOKEN_ORDER_EXPIRY,
    TokenOrder.LAST_USE: pb.TOKEN_ORDER_LAST_USE,
}


def filter_out(wanted: TokenFilter) -> pb.TokenFilter:
    """Convert a filter. Raises InvalidArgument for empty `ids`, which would select every token."""
    message = pb.TokenFilter(
        name_contains=wanted.name_contains,
        label=wanted.labels,
        search=wanted.search,
        can_write=wanted.can_write,
        never_used=wanted.never_used,
        never_expires=wanted.never_expires,
        leaked=wanted.leaked,
    )
    if wanted.scope is not None:
        message.scope = _convert.scope_out(wanted.scope, "filter.scope")
    if wanted.state is not None:
        message.state = _STATES_OUT[wanted.state]
    if wanted.ids is not None:
        message.ids.extend(_convert.several(wanted.ids, "filter.ids"))
        if not message.ids:
            raise invalid("filter.ids", "is empty; pass None to select tokens with any id")
    if wanted.expires_before is not None:
        time = _convert.time_out(wanted.expires_before, "filter.expires_before")
        message.expires_before.CopyFrom(time)
    if wanted.unused_since is not None:
        message.unused_since.CopyFrom(_convert.time_out(wanted.unused_since, "filter.unused_since"))
    if wanted.secret_created_before is not None:
        time = _convert.time_out(wanted.secret_created_before, "filter.secret_created_before")
        message.secret_created_before.CopyFrom(time)
    return message


def order_out(order: TokenOrder) -> pb.TokenOrder.ValueType:
    """Convert an order."""
    return _ORDERS_OUT[order]


def check_applied(request: pb.ListRequest, answer: pb.ListResponse) -> None:
    """Raise FailedPrecondition if a server of an earlier release ignored a part of the request."""
    asked = (
        request.HasField("filter")
        or request.order != pb.TOKEN_ORDER_UNSPECIFIED
        or request.reverse
        or request.include_total_size
    )
    if asked and not answer.filter_applied:
        raise FailedPrecondition(
            "This server is of a release that cannot filter, order or count tokens. Upgrade it, or "
            "list without these.",
            reason=NOT_APPLIED,
        )
