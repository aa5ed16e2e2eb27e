-- Counting tokens by expiry and state reads one index, and not a row of the table for each token.
-- Releases from schema 0010 work with this.
-- This release works without it too.

DROP INDEX token_list_expiry;
CREATE INDEX token_list_expiry
    ON token (account_id, coalesce(expire_time, 'infinity'::timestamptz), id)
    INCLUDE (expire_time, disable_time, scope)
    WHERE delete_time IS NULL;
