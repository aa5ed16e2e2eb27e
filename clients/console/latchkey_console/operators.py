"""Decides who may use the operators' view: people in one of the configured groups."""

from starlette.requests import Request

from latchkey_console.groups import is_member
from latchkey_console.identity import ProxyHeader, Refused, Viewer

__all__ = ["ProxyOperators", "not_an_operator"]


def not_an_operator() -> Refused:
    """Return the error for a person who is in none of the groups."""
    return Refused(
        403,
        "You are not an operator",
        "You are signed in, but this page is only for the operators of the service. Ask your "
        "administrator to add you to their group.",
    )


class ProxyOperators(ProxyHeader):
    """Trusts a sign-in proxy that sends the groups of a person, separated by commas."""

    def viewer(self, request: Request) -> Viewer:
        """Return the operator. Raises Refused."""
        value = self.value(request, "The sign-in proxy sent several lists of groups.")
        person = self.person(request)
        if not person:
            # The audit log must say who read it.
            raise self.nobody()
        if not is_member([group.strip(" \t") for group in value.split(",")], self.operators):
            raise not_an_operator()
        return Viewer("", person=person)
