"""The tokens that `Client.import_tokens` creates, and the result for each."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from latchkey._rate_limit import RateLimit
from latchkey.errors import FieldViolation
from latchkey.models import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedToken:
    """A token to import, for an existing secret. The fields are those of `Client.create`."""

    account_id: str
    name: str
    scope: Scope
    secret_sha256: bytes = field(repr=False)
    """The SHA-256 hash of the whole secret: 32 bytes."""
    hint: str = ""
    """What people may see of the secret, such as its prefix and last four characters."""
    create_time: datetime | None = None
    """When the secret was created. None: now."""
    expire_time: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    allowed_networks: Sequence[str] = ()
    permissions: Sequence[str] = ()
    rate_limit: RateLimit | None = None
    disabled: bool = False


class ImportOutcome(enum.Enum):
    """What `import_tokens` did with a token."""

    IMPORTED = "imported"
    """The token was created. With `validate_only`: it would be."""
    EXISTS = "exists"
    """A token of this account has this secret already, or had it. Nothing was changed."""
    OTHER_ACCOUNT = "other_account"
    """A token of another account has or had this secret."""
    NAME_TAKEN = "name_taken"
    INVALID = "invalid"
    UNSPECIFIED = "unspecified"
    """An outcome that this version of the library does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What `import_tokens` did with one token."""

    outcome: ImportOutcome
    token_id: str = ""
    """Set with IMPORTED and EXISTS."""
    field_violations: tuple[FieldViolation, ...] = ()
    """Set with INVALID."""
