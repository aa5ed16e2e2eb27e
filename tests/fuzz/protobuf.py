"""Mutates messages by field, in ways that byte mutations would rarely reach while keeping them
decodable."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["change"]

INTEGERS = (0, 1, 2, 3, 7, -1, 500, 501, 1_000, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63))
SECONDS = (-62135596801, -62135596800, 253402300799, 253402300800, 315576000001, 4102444800)
ODD_TEXT = (
    "", " ", "\0", "\x1b[2J", "\u2028", "\ufffe", "é", "e\u0301", "ß", "İ", "\U0001f511", "٣", "'",
    '"; --',
    "%s%n", "../..", "{}", "[]", "*", "a:b", "-", ".", "\\", "\r\n",
    "a" * 63, "a" * 64, "a" * 65, "a" * 256,
    "é" * 64, "😀" * 300,
)  # fmt: skip
# One label more than the limit.
REPEATED = 17
_SIGNED_32 = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_ENUM}


def change(message: Message, words: Sequence[str], chance: random.Random) -> None:
    """Mutate one to three parts of a message. `words` are texts with a meaning in it."""
    for _ in range(chance.randint(1, 3)):
        _change_one(message, words, chance)


def _change_one(message: Message, words: Sequence[str], chance: random.Random) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field: Any = chance.choice(fields)
    # Low, so that most messages remain mostly valid.
    if chance.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        labels = getattr(message, field.name)
        for _ in range(chance.choice((1, 1, 1, REPEATED))):
            labels[_text(words, chance)] = _text(words, chance)
        return
    if field.is_repeated:
        _change_repeated(getattr(message, field.name), field, words, chance)
        return
    if field.message_type is not None:
        part = getattr(message, field.name)
        part.SetInParent()
        _change_one(part, words, chance)
        return
    setattr(message, field.name, _value(field, getattr(message, field.name), words, chance))


def _change_repeated(
    items: Any, field: FieldDescriptor, words: Sequence[str], chance: random.Random
) -> None:
    if items and chance.random() < 0.3:
        del items[chance.randrange(len(items))]
    elif field.message_type is None:
        items.append(_value(field, None, words, chance))
    elif items and chance.random() < 0.5:
        _change_one(chance.choice(items), words, chance)
    else:
        for _ in range(chance.choice((1, 1, REPEATED))):
            _change_one(items.add(), words, chance)


def _value(field: FieldDescriptor, old: Any, words: Sequence[str], chance: random.Random) -> object:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = _text(words, chance)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return text.encode()
        return _spliced(old or "", text, chance)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return not old
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return chance.choice((0.0, -1.0, float("inf"), float("nan")))
    number = chance.choice((*INTEGERS, *SECONDS, chance.getrandbits(40), 10**9, 10**9 - 1))
    bits = 32 if kind in _SIGNED_32 or kind == FieldDescriptor.CPPTYPE_UINT32 else 64
    signed = kind not in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    number %= 2**bits
    return number - 2**bits if signed and number >= 2 ** (bits - 1) else number


def _text(words: Sequence[str], chance: random.Random) -> str:
    return chance.choice(words if chance.random() < 0.6 else ODD_TEXT)


def _spliced(old: str, new: str, chance: random.Random) -> str:
    """Return the new text, instead of the old one or combined with it."""
    place = chance.randint(0, len(old))
    ways: list[Callable[[], str]] = [
        lambda: new,
        lambda: new,
        lambda: old[:place] + new + old[place:],
        lambda: old[:place] + old[place + 1 :],
        lambda: old * 2,
        old.swapcase,
    ]
    return chance.choice(ways)()
