"""The format of account ids, which other services choose, and of Latchkey's token ids. Pure."""

import re
from typing import Final

__all__ = ["ACCOUNT_ID", "TOKEN_ID"]

# Wide enough for the ids of sign-in providers, such as email addresses, `auth0|5f7c8e` and paths. A
# policy ends a prefix of account ids with `*`, so that character is not among them.
ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9._:@|+=/~-]{1,128}")
TOKEN_ID: Final = re.compile(r"tok_[0-9a-z]{26}")
