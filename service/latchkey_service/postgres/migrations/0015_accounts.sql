-- Account IDs as sign-in providers have them, such as jane@example.com or auth0|5f7c8e.

-- Every existing row satisfies the narrower rule that this one replaces, so NOT VALID avoids reading
-- them all under the lock. New rows are checked all the same.
ALTER TABLE token
    DROP CONSTRAINT token_account_id_check,
    ADD CONSTRAINT token_account_id_check
        CHECK (account_id ~ '^[A-Za-z0-9._:@|+=/~-]{1,128}$') NOT VALID;

ALTER TABLE audit
    DROP CONSTRAINT audit_account_id_check,
    ADD CONSTRAINT audit_account_id_check
        CHECK (account_id ~ '^[A-Za-z0-9._:@|+=/~-]{0,128}$') NOT VALID;
