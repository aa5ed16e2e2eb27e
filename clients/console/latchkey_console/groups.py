"""The groups of people who may use the operators' view. Pure."""

from collections.abc import Set as AbstractSet

__all__ = ["checked", "is_member"]


def checked(groups: tuple[str, ...], way: str, *, has_account: bool) -> frozenset[str]:
    """Return the groups of operators, or none for the API Tokens page.

    `way` is the option that chooses how visitors are identified. Raises ValueError with a text that
    names the option.
    """
    if not groups:
        if way == "--groups-header":
            raise ValueError("--groups-header requires --operator-group")
        return frozenset()
    if way not in ("--groups-header", "--oidc-issuer"):
        raise ValueError(
            f"{way} does not say who is an operator: with --operator-group, use --groups-header or "
            "--oidc-issuer"
        )
    if has_account:
        raise ValueError("--operator-group: operators have no account; name no claim of accounts")
    for group in groups:
        if not group.isprintable() or "," in group or group != group.strip() or not group:
            raise ValueError("--operator-group: give the name of a group, without commas")
    return frozenset(groups)


def is_member(claim: object, groups: AbstractSet[str]) -> bool:
    """Return whether a claim, a text or an array of texts, names one of the groups."""
    named = claim if isinstance(claim, list) else [claim]
    return any(isinstance(group, str) and group in groups for group in named)
