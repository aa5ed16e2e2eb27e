"""The format of ids: accounts', which other services choose, and tokens', which Latchkey creates.

The console has the format of account ids as well, because clients do not import the service.
"""

import re
from typing import Final

__all__ = ["ACCOUNT_ID", "TOKEN_ID"]

ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TOKEN_ID: Final = re.compile(r"tok_[0-9a-z]{26}")
