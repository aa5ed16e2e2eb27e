"""The reference model of a token's life: what the contract says, and nothing else."""

from dataclasses import dataclass, field

from tests.helpers.imported_keys import IMPORTED_PREFIX

__all__ = ["LIMITED_CALLS", "Model", "WrongAcceptError", "hint_of"]

# The burst of the rate limit that a token may have. It fills again only after an hour.
LIMITED_CALLS = 4


class WrongAcceptError(Exception):
    """The service accepts what the model refuses. `eventually` does not wait for it."""


@dataclass
class Model:
    """A token as the reference model knows it: what the contract says, and nothing else."""

    account: str
    id: str
    name: str
    scope: int
    permissions: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    disabled: bool = False
    deleted: bool = False
    expires: bool = False
    expired: bool = False
    # Whether it holds its name. An expired token loses it to the next one that wants it.
    named: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    limited: bool = False
    # Calls of its rate limit that it has not spent.
    calls_left: int = LIMITED_CALLS
    # Newest first, each with whether it works.
    secrets: list[tuple[str, bool]] = field(default_factory=list)
    # The secret whose first use will end the older ones.
    unused: str | None = None
    # Those that a first use is about to end.
    ending: set[str] = field(default_factory=set)
    # The secret with which it was imported.
    imported: str | None = None
    # Those that were reported as leaked while they had not ended.
    leaked: set[str] = field(default_factory=set)
    # How many verifies were VALID, and with which secrets.
    uses: int = 0
    used_secrets: set[str] = field(default_factory=set)

    def verdict(self, secret: str, scope: int, address: str, required: tuple[str, ...]) -> str:
        allowed = {"10.1.2.3": "10.0.0.0/8", "192.0.2.1": "192.0.2.0/24"}
        if self.deleted:
            return "DELETED"
        if self.disabled:
            return "DISABLED"
        if self.expired or not dict(self.secrets)[secret]:
            return "EXPIRED"
        if self.networks and allowed.get(address) not in self.networks:
            return "ADDRESS_NOT_ALLOWED"
        if scope > self.scope:
            return "INSUFFICIENT_SCOPE"
        if not all(p in self.permissions or "orders:*" in self.permissions for p in required):
            return "INSUFFICIENT_PERMISSIONS"
        return "VALID"

    def accepted(self, secret: str) -> bool:
        """Count a verify that was VALID. Return whether it was the first use that ends others."""
        self.uses += 1
        self.used_secrets.add(secret)
        self.calls_left -= self.limited
        if secret != self.unused:
            return False
        self.unused = None
        position = [one for one, _ in self.secrets].index(secret)
        older = {one for one, works in self.secrets[position + 1 :] if works}
        self.ending |= older
        self.secrets = [(one, works and one not in older) for one, works in self.secrets]
        return bool(older)


def hint_of(secret: str) -> str:
    """Return what people see of a secret."""
    prefix = IMPORTED_PREFIX if secret.startswith(IMPORTED_PREFIX) else "lk_"
    return f"{prefix}…{secret[-4:]}"
