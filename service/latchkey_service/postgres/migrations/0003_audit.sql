-- The audit log: every call that manages tokens, allowed or denied.

CREATE TABLE audit (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time       timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The caller's name in the policy. Empty if the caller is unknown or there is no policy.
    caller     text COLLATE "C" NOT NULL,
    method     text COLLATE "C" NOT NULL,
    -- Empty if the request named no valid account, so that no secret can end up here.
    account_id text COLLATE "C" NOT NULL CHECK (account_id ~ '^[A-Za-z0-9._:-]{0,64}$'),
    token_id   text COLLATE "C" NOT NULL CHECK (char_length(token_id) <= 64),
    peer       text NOT NULL,
    request_id text NOT NULL,
    -- A value of google.rpc.Code.
    code       smallint NOT NULL DEFAULT 0,
    reason     text COLLATE "C" NOT NULL DEFAULT '',
    -- Number of calls that this row stands for.
    calls      bigint NOT NULL DEFAULT 1 CHECK (calls > 0)
);

CREATE INDEX audit_newest ON audit (time DESC, id DESC);
CREATE INDEX audit_account ON audit (account_id, time DESC, id DESC);
CREATE INDEX audit_caller ON audit (caller, time DESC, id DESC);
CREATE INDEX audit_token ON audit (token_id, time DESC, id DESC) WHERE token_id <> '';

-- The table is append-only for every role. Rows never change, and only the retention job may delete
-- them, after one day at the earliest.
CREATE FUNCTION audit_keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE'
       AND current_setting('latchkey.audit_retention', true) = 'on'
       AND OLD.time < clock_timestamp() - interval '1 day' THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'the audit table is append-only' USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER audit_keep_rows BEFORE UPDATE OR DELETE ON audit
    FOR EACH ROW EXECUTE FUNCTION audit_keep();
CREATE TRIGGER audit_keep_all BEFORE TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_keep();
