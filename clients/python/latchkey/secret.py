"""`Secret`: a bearer string that cannot be printed by mistake.

It owns redaction by type. It is deliberately no subclass of str: joining, encoding or serialising
a str never asks it how it wants to be shown.
"""

import hmac
from typing import NoReturn, Self

from latchkey._shape import placeholder


class Secret:
    """A bearer secret. `reveal()` is the only way to its text.

    Two are equal when their texts are, compared in constant time. It is immutable, has no hash
    (a set or dict would compare in variable time) and refuses to be pickled.
    """

    __slots__ = ("__text",)
    __text: str

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            # Without the value: the message of a TypeError ends up in logs.
            raise TypeError(f"a secret is made from a str, not from {type(text).__name__}")
        object.__setattr__(self, "_Secret__text", text)

    def reveal(self) -> str:
        """Return the secret itself. Hand it to its holder; do not log or store it."""
        return self.__text

    def __str__(self) -> str:
        return placeholder(self.__text)

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # surrogatepass: any str can be held, and must be comparable.
        return hmac.compare_digest(
            self.__text.encode("utf-8", "surrogatepass"),
            other.__text.encode("utf-8", "surrogatepass"),
        )

    __hash__ = None  # type: ignore[assignment]  # the documented way to be unhashable

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        # Not through pickling, as copy would: dataclasses.asdict() copies its values.
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret is not pickled: pass reveal() on purpose, to where it may go")
