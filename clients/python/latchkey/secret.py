"""`Secret`: a bearer string that cannot be printed by mistake.

The type redacts itself. It is not a subclass of str, because joining, encoding or serialising a str
would bypass that.
"""

import hmac
from typing import NoReturn, Self

from latchkey._shape import placeholder


class Secret:
    """A bearer secret. Only `reveal()` returns its text.

    Secrets are equal if their texts are, compared in constant time. A Secret is immutable and
    cannot be pickled. It is not hashable, because a set or dict would compare in variable time.
    """

    __slots__ = ("__text",)
    __text: str

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            # Omit the value: the message of a TypeError ends up in logs.
            raise TypeError(f"a secret must be a str, not {type(text).__name__}")
        object.__setattr__(self, "_Secret__text", text)

    def reveal(self) -> str:
        """Return the text of the secret. Give it only to its holder; do not log or store it."""
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
        # surrogatepass: a Secret can hold any str, so every str must be comparable.
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
        # dataclasses.asdict() copies its values. The default copy would use pickling.
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled; pass reveal() explicitly instead")
