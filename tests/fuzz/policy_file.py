"""The policy file: every text yields a Policy, or a PolicyError that names the place, quickly."""

import random
import re
import time
import tomllib
from collections.abc import Iterable

from latchkey_service.access.policy import Policy, PolicyError, parse

from tests.fuzz.target import Finding, Target

# CPU time, so that a busy machine causes no finding. About a hundred times the time of the longest
# input.
CPU_SECONDS_MAX = 2.0
_DIGEST = "sha256:" + "5a" * 32
GOOD = f"""\
[callers.shop]
certificates = ["spiffe://example.org/shop", "shop.internal"]
credentials = ["{_DIGEST}"]
roles = ["verifier", 'auditor']
accounts = ["acme", "team-*"]

[callers."a.b"]  # quoted
roles = []

[roles.auditor]
methods = ["/latchkey.v1.AuditService/List"]
"""
PIECES = (
    "[callers.x]\n", "[callers]\n", "[roles.y]\n", "[[callers]]\n", "roles = [", "]\n",
    "methods = [",
    '"verifier", ', "certificates = ", "credentials = ", "accounts = ", '"a*"', f'"{_DIGEST}"',
    '"spiffe://a/b"', '"A.example"', "callers.z.roles = []\n", 'x = """\n', '"""', "'''\n", "{",
    "}",
    "= ", ", ", "\n", "\r\n", "\r", "\t", "# ", "\u2028", "\x85", "\x0c", "\ufeff", "é",
    "1979-05-27",
    "1979-05-27T07:32:00Z", "07:60:00", "0x", "1_0", "1e400", "nan", "9" * 30, "9" * 4_400,
    "\\u0000",
    "[" * 40, "[" * 500, "{a=" * 400, "a." * 60, "a." * 300, "'" * 3, "\\", "\0",
)  # fmt: skip
_PLACE = re.compile(r"is not TOML: |(?!:)[^\n]+: ")


class PolicyFile(Target):
    """An input is the text of a file."""

    # Enough for each of the pieces; parsing time grows with the square of a key's length.
    length_max = 4_608
    mutates = True

    def seeds(self) -> Iterable[bytes]:
        yield GOOD.encode()
        for table in GOOD.split("\n\n"):
            yield table.encode()
        yield b"[callers.shop]\nroles = ['nobody']\n"
        yield b"[callers.shop]\n\nnope = 1\n"
        yield b"callers = 1\n"
        yield b"[callers.x]\naccounts = ['a b']\n"

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        text = data.decode("utf-8", "replace")
        lines = text.split("\n")
        place, line = chance.randint(0, len(text)), chance.randrange(len(lines))
        match chance.randrange(6):
            case 0 | 1:
                text = text[:place] + chance.choice(PIECES) + text[place:]
            case 2:
                text = "\n".join(lines[:line] + lines[line + 1 :])
            case 3:
                text = "\n".join([*lines[:line], chance.choice(lines), *lines[line:]])
            case 4:
                words = re.split(r"(\w+)", text)
                word = chance.randrange(len(words))
                words[word] = chance.choice(words)
                text = "".join(words)
            case _:
                text = text[:place] + text[place + chance.randint(1, 9) :]
        return text.encode()

    def one(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            # `read_text` rejects it before it is parsed.
            return
        start = time.thread_time()
        try:
            policy = parse(text)
        except PolicyError as error:
            if not _PLACE.match(str(error)):
                raise Finding(f"the error does not name a place in the file: {error}") from None
        else:
            _sound(policy, text)
        if (seconds := time.thread_time() - start) > CPU_SECONDS_MAX:
            raise Finding(f"it took {seconds:.1f} s of CPU")


def _sound(policy: Policy, text: str) -> None:
    """Check that only callers in the file are accepted."""
    document = tomllib.loads(text)
    if not policy.callers <= set(document.get("callers", {})):
        raise Finding("a caller is not in the file")
    for key, caller in policy.certificates.items():
        names = document["callers"][caller.name]["certificates"]
        if key not in names and key not in [name.lower() for name in names]:
            raise Finding("a certificate is given to a caller who does not have it")


TARGET = PolicyFile
