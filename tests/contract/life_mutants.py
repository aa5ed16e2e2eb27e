"""Faults of the service's management of tokens, which `test_token_life.py` must find.

Each function plants one fault, as mild as it can be: one kind of change, in one situation.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from latchkey_coherence import verdict as rules
from latchkey_coherence.verdict import Verdict
from latchkey_service.errors import FailedPrecondition
from latchkey_service.tokens import changes, importing, lifecycle, verifier
from latchkey_service.tokens.bulk import Bulk, Outcome
from latchkey_service.tokens.filter_table import condition_of
from latchkey_service.tokens.imported import ImportedSecrets
from latchkey_service.tokens.importing import Importer
from latchkey_service.tokens.lifecycle import Lifecycle
from latchkey_service.tokens.lifecycle_store import LifecycleStore
from latchkey_service.tokens.token_changer import TokenChanger
from latchkey_service.tokens.usage_table import UsageTable

__all__ = ["MUTANTS", "TRACE_MUTANTS"]

Patch = pytest.MonkeyPatch


def older_secrets_live_on(patch: Patch) -> None:
    """Rotate without a grace leaves the older secrets for an hour."""
    rotate = Lifecycle.rotate

    async def later(self: Any, rotation: Any, call: Any) -> Any:
        return await rotate(self, replace(rotation, grace=timedelta(hours=1)), call)

    patch.setattr(Lifecycle, "rotate", later)


def one_older_secret_stays(patch: Patch) -> None:
    """RetireSecrets leaves the second newest secret."""
    retiring = TokenChanger._retiring

    def fewer(self: Any, state: Any, ordinal: int) -> Any:
        return retiring(self, state, ordinal - 1)

    patch.setattr(TokenChanger, "_retiring", fewer)


def newest_that_works_stays(patch: Patch) -> None:
    """RetireSecrets leaves the newest secret that has not ended, although the newest has."""
    retiring = TokenChanger._retiring

    def of_working(self: Any, state: Any, _ordinal: int) -> Any:
        return retiring(self, state, state.secrets[0].record.ordinal if state.secrets else 0)

    patch.setattr(TokenChanger, "_retiring", of_working)


def revoked_twice(patch: Patch) -> None:
    """RevokeSecret says that it has ended a secret that had ended before."""
    revoke = Bulk.revoke_secrets

    async def claims(self: Any, secrets: Any, call: Any) -> Any:
        outcomes, receipt = await revoke(self, secrets, call)
        return [Outcome.ENDED if o is Outcome.ENDED_BEFORE else o for o in outcomes], receipt

    patch.setattr(Bulk, "revoke_secrets", claims)


def lost_secret_works(patch: Patch) -> None:
    """A retry with a request id does not end the secret that nobody received."""
    replace_secret, minting = Lifecycle._replace_secret, TokenChanger._minting
    retrying = [False]

    async def retry(self: Any, *arguments: Any) -> Any:
        retrying[0] = True
        try:
            return await replace_secret(self, *arguments)
        finally:
            retrying[0] = False

    def keeping(
        self: Any, state: Any, kept: Any, retired: Any, request: Any, **options: Any
    ) -> Any:
        if retrying[0]:
            kept, retired = [secret.record for secret in state.secrets], []
        return minting(self, state, kept, retired, request, **options)

    patch.setattr(Lifecycle, "_replace_secret", retry)
    patch.setattr(TokenChanger, "_minting", keeping)


def _updates(patch: Patch, change: Callable[[Any, Any], Any]) -> None:
    """Replace what Update makes of a token: `change` gets the old and the right new state."""
    updated = changes.updated

    def other(old: Any, new: Any) -> Any:
        return change(old, updated(old, new))

    patch.setattr(lifecycle, "updated", other)


def networks_are_never_cleared(patch: Patch) -> None:
    """Update with an empty list of networks leaves them."""
    _updates(
        patch,
        lambda old, new: new._replace(
            allowed_networks=new.allowed_networks or old.allowed_networks
        ),
    )


def scope_clears_permissions(patch: Patch) -> None:
    """Update to a narrower scope takes the permissions away."""
    _updates(
        patch,
        lambda old, new: new._replace(permissions=()) if new.scope < old.scope else new,
    )


def networks_do_not_narrow(patch: Patch) -> None:
    """Update of the networks does not wait for verifiers."""
    narrows = changes.narrows

    def otherwise(old: Any, new: Any) -> bool:
        return narrows(old._replace(allowed_networks=()), new._replace(allowed_networks=()))

    patch.setattr(lifecycle, "narrows", otherwise)


def labels_are_merged(patch: Patch) -> None:
    """Update of the labels keeps those that it does not name."""
    _updates(patch, lambda old, new: new._replace(labels={**old.labels, **new.labels}))


def labels_do_not_choose(patch: Patch) -> None:
    """DeleteAll ignores the labels of its filter."""

    def without(selected: Any, *arguments: Any) -> str:
        return condition_of(replace(selected, labels=None), *arguments)

    patch.setattr("latchkey_service.tokens.bulk_store.condition_of", without)


def limits_are_never_lifted(patch: Patch) -> None:
    """Update without a rate limit leaves the one that the token has."""
    _updates(patch, lambda old, new: new._replace(rate_limit=new.rate_limit or old.rate_limit))


def limits_do_not_narrow(patch: Patch) -> None:
    """Update of the rate limit does not wait for verifiers."""
    narrows = changes.narrows

    def otherwise(old: Any, new: Any) -> bool:
        return narrows(old._replace(rate_limit=None), new._replace(rate_limit=None))

    patch.setattr(lifecycle, "narrows", otherwise)


def first_use_ends_all_but_the_newest(patch: Patch) -> None:
    """The first use of a secret ends this one too, if there is a newer one."""
    retiring = TokenChanger._retiring

    def more(self: Any, state: Any, _ordinal: int) -> Any:
        return retiring(self, state, state.newest_ordinal)

    patch.setattr(TokenChanger, "_retiring", more)


def a_lost_first_use_is_forgotten(patch: Patch) -> None:
    """A retry of Rotate with retirement at first use returns a secret without it."""
    minting = TokenChanger._minting

    def without(self: Any, state: Any, *arguments: Any, **options: Any) -> Any:
        again = any(s.record.retire_on_first_use for s in state.secrets)
        options["retire_on_first_use"] = options["retire_on_first_use"] and not again
        return minting(self, state, *arguments, **options)

    patch.setattr(TokenChanger, "_minting", without)


def disabled_tokens_are_spared(patch: Patch) -> None:
    """DeleteAll does not delete disabled tokens."""

    def spared(*arguments: Any) -> str:
        return f"{condition_of(*arguments)} AND t.disable_time IS NULL"

    patch.setattr("latchkey_service.tokens.bulk_store.condition_of", spared)


def expiry_before_disabling(patch: Patch) -> None:
    """An ended secret of a disabled token is EXPIRED, not DISABLED."""
    decide = rules.decide

    def otherwise(record: Any, scope: int, now: float, *more: Any) -> Verdict:
        verdict = decide(record, scope, now, *more)
        if verdict is Verdict.DISABLED and record.expires <= now:
            return Verdict.EXPIRED
        return verdict

    patch.setattr(verifier, "decide", otherwise)


def a_sixth_secret(patch: Patch) -> None:
    """A token may have six secrets that work."""
    patch.setattr(lifecycle, "SECRETS_MAX", 6)


def disabled_tokens_are_not_rotated(patch: Patch) -> None:
    """Rotate refuses a disabled token."""
    minting = TokenChanger._minting

    def refusing(self: Any, state: Any, *arguments: Any, **options: Any) -> Any:
        if state.record.disable_time is not None:
            raise FailedPrecondition("disabled")
        return minting(self, state, *arguments, **options)

    patch.setattr(TokenChanger, "_minting", refusing)


def absent_secrets_stay_absent(patch: Patch) -> None:
    """A server that lacked a secret refuses it for a while after its import."""

    def is_absent(self: Any, secret: Any) -> bool:
        return secret.digests[0] in self._absent

    patch.setattr(ImportedSecrets, "is_absent", is_absent)


def imports_tell_of_other_accounts(patch: Patch) -> None:
    """Import names the token that has the secret, even that of another account."""
    compare = importing._compare

    def telling(new: Any, present: Any) -> Any:
        return compare(new, present._replace(tokens=_owned_by_all(new, present.tokens)))

    patch.setattr(importing, "_compare", telling)


def _owned_by_all(new: Any, tokens: Any) -> Any:
    accounts = {digest: row.record.account_id for row in new.values() for digest in row.digests}
    return {digest: (found[0], accounts[digest]) for digest, found in dict(tokens).items()}


def imports_forget_to_disable(patch: Patch) -> None:
    """A disabled token works once it is imported."""
    checked = Importer._checked

    def enabled(self: Any, row: Any, *arguments: Any) -> Any:
        return checked(self, replace(row, disabled=False), *arguments)

    patch.setattr(Importer, "_checked", enabled)


def expired_tokens_hold_their_names(patch: Patch) -> None:
    """No token can take the name of an expired one."""

    async def kept(*_arguments: Any) -> bool:
        return False

    patch.setattr(LifecycleStore, "free_expired_name", kept)


def an_earlier_expiry_does_not_narrow(patch: Patch) -> None:
    """Update of the expiry does not wait for verifiers."""
    narrows = changes.narrows

    def otherwise(old: Any, new: Any) -> bool:
        return narrows(old._replace(expire_time=None), new._replace(expire_time=None))

    patch.setattr(lifecycle, "narrows", otherwise)


def uses_of_imported_secrets_are_lost(patch: Patch) -> None:
    """Uses of secrets that the service has not made are not written."""
    record = UsageTable.record

    async def fewer(self: Any, writer: str, number: int, uses: Any) -> Any:
        ours = [use for use in uses if use.hint.startswith("lk_")]
        return await record(self, writer, number, ours)

    patch.setattr(UsageTable, "record", fewer)


def uses_count_for_no_secret(patch: Patch) -> None:
    """Uses are counted for the token, but not for its secrets."""
    record = UsageTable.record

    async def nameless(self: Any, writer: str, number: int, uses: Any) -> Any:
        return await record(self, writer, number, [use._replace(hint="") for use in uses])

    patch.setattr(UsageTable, "record", nameless)


def enable_is_recorded_as_disable(patch: Patch) -> None:
    """The audit entry of an Enable names another method."""
    change = LifecycleStore.change

    async def misnamed(self: Any, wanted: Any, context: Any) -> Any:
        method = context.method.replace("Enable", "Disable")
        return await change(self, wanted, replace(context, method=method))

    patch.setattr(LifecycleStore, "change", misnamed)


MUTANTS = (
    older_secrets_live_on,
    one_older_secret_stays,
    newest_that_works_stays,
    revoked_twice,
    lost_secret_works,
    networks_are_never_cleared,
    scope_clears_permissions,
    networks_do_not_narrow,
    labels_are_merged,
    labels_do_not_choose,
    limits_are_never_lifted,
    limits_do_not_narrow,
    first_use_ends_all_but_the_newest,
    a_lost_first_use_is_forgotten,
    disabled_tokens_are_spared,
    expiry_before_disabling,
    a_sixth_secret,
    disabled_tokens_are_not_rotated,
    absent_secrets_stay_absent,
    imports_tell_of_other_accounts,
    imports_forget_to_disable,
    expired_tokens_hold_their_names,
    an_earlier_expiry_does_not_narrow,
)
# Every answer is right: only uses or audit entries show the fault.
TRACE_MUTANTS = (
    uses_of_imported_secrets_are_lost,
    uses_count_for_no_secret,
    enable_is_recorded_as_disable,
)
