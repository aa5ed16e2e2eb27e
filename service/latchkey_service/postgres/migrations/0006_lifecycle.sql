-- The life of a token: several secrets, changes, limits on its use, seals, and safe retries.

-- The previous release ignores these columns. It would accept a disabled token, an address outside
-- the networks, or a retired secret. So the service refuses such changes while a verifier with
-- rules = 0 is registered (see below).
ALTER TABLE token
    ADD COLUMN description      text NOT NULL DEFAULT '' CHECK (char_length(description) <= 256),
    ADD COLUMN disable_time     timestamptz,
    -- CIDR notation, in canonical form. Empty: any address.
    ADD COLUMN allowed_networks text[] NOT NULL DEFAULT '{}',
    -- `resource:action`, where the action may be `*`.
    ADD COLUMN permissions      text[] NOT NULL DEFAULT '{}',
    -- Increases with each change of the token or its secrets. A change states the version that it
    -- was computed from.
    ADD COLUMN version          bigint NOT NULL DEFAULT 0;

-- For removing tokens some time after they have expired.
CREATE INDEX token_expiry ON token (expire_time)
    WHERE delete_time IS NULL AND expire_time IS NOT NULL;

ALTER TABLE secret
    -- Increases with each new secret of a token.
    ADD COLUMN ordinal             integer NOT NULL DEFAULT 0,
    -- Empty and NULL for a token's only secret, made by an earlier release: those of the token.
    ADD COLUMN hint                text NOT NULL DEFAULT '',
    ADD COLUMN create_time         timestamptz,
    -- End of the grace after a rotation. Judged by the clock, as the token's expiry is.
    ADD COLUMN expire_time         timestamptz,
    -- Set: the secret has ended, whatever any clock says.
    ADD COLUMN retire_time         timestamptz,
    -- The first look-up of this secret retires the older ones.
    ADD COLUMN retire_on_first_use boolean NOT NULL DEFAULT false,
    -- The idempotent request that made this secret. A retry retires it.
    ADD COLUMN request_id          uuid,
    -- HMAC over what the verdict depends on. The key is derived from the pepper, so the database
    -- cannot compute it. NULL: not sealed yet, as by earlier releases. Empty: the secret or its
    -- token has ended, so that restoring the row's other columns does not revive it.
    ADD COLUMN seal                bytea;

-- For sealing the rows of earlier releases.
CREATE INDEX secret_unsealed ON secret (digest) WHERE seal IS NULL;
-- For removing secrets some time after they have ended.
CREATE INDEX secret_ended ON secret (least(expire_time, retire_time))
    WHERE expire_time IS NOT NULL OR retire_time IS NOT NULL;

-- HMAC with a key derived from this pepper: proof that every secret of this pepper was sealed. From
-- then on, a row without a seal is not genuine.
ALTER TABLE pepper ADD COLUMN all_sealed bytea;

-- The rules by which a verifier judges tokens. 0: only scope, expiry and deletion.
ALTER TABLE verifier ADD COLUMN rules smallint NOT NULL DEFAULT 0;

-- Requests with an id, so that a retry does not create a second token or a further secret.
CREATE TABLE request (
    account_id  text COLLATE "C" NOT NULL,
    request_id  uuid NOT NULL,
    method      text COLLATE "C" NOT NULL,
    -- A hash of the request's fields, without secrets.
    body        bytea NOT NULL,
    token_id    text COLLATE "C" NOT NULL REFERENCES token (id) ON DELETE CASCADE,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (account_id, request_id)
);

CREATE INDEX request_age ON request (create_time);
CREATE INDEX request_token ON request (token_id);
