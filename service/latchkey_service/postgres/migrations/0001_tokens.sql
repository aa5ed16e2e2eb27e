-- Tokens, their secrets, and the order of invalidations.

-- A deleted token stays as a tombstone (delete_time set). So Verify answers DELETED, not UNKNOWN,
-- and a repeated Delete finds its receipt.
CREATE TABLE token (
    id             text COLLATE "C" PRIMARY KEY,
    account_id     text COLLATE "C" NOT NULL CHECK (account_id ~ '^[A-Za-z0-9._:-]{1,64}$'),
    name           text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 64),
    -- The name, case-folded by the service because Postgres' lower() depends on the locale.
    name_key       text COLLATE "C" NOT NULL,
    -- 1 READ, 2 WRITE, as in the contract.
    scope          smallint NOT NULL CHECK (scope IN (1, 2)),
    create_time    timestamptz NOT NULL,
    expire_time    timestamptz,
    last_used_time timestamptz,
    delete_time    timestamptz,
    hint           text NOT NULL,
    labels         jsonb NOT NULL DEFAULT '{}'
);

CREATE UNIQUE INDEX token_live_name ON token (account_id, name_key) WHERE delete_time IS NULL;

-- The order of List: one index scan per page, at any depth.
CREATE INDEX token_newest ON token (account_id, create_time DESC, id DESC)
    WHERE delete_time IS NULL;

CREATE INDEX token_tombstone ON token (delete_time) WHERE delete_time IS NOT NULL;

-- Ids of the keys that digests were made with. The keys themselves are never in the database.
CREATE TABLE pepper (
    id          text COLLATE "C" PRIMARY KEY,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- A separate table, because a later release may give a token several secrets.
CREATE TABLE secret (
    digest    bytea PRIMARY KEY CHECK (octet_length(digest) = 32),
    pepper_id text COLLATE "C" NOT NULL REFERENCES pepper (id),
    token_id  text COLLATE "C" NOT NULL REFERENCES token (id) ON DELETE CASCADE
);

CREATE INDEX secret_token ON secret (token_id);
CREATE INDEX secret_pepper ON secret (pepper_id);

-- The single counter of invalidations. A transaction that turns VALID into another verdict
-- increments it and thereby locks the row until the commit. So revision order is commit order,
-- without the gaps of a sequence.
CREATE TABLE head (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    revision bigint NOT NULL
);

INSERT INTO head (revision) VALUES (0);

-- The tokens that each revision made invalid.
CREATE TABLE invalidation (
    revision    bigint NOT NULL,
    token_id    text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (revision, token_id)
);

-- The receipt of each deletion. A repeated Delete returns the same one.
CREATE TABLE deletion (
    token_id               text COLLATE "C" PRIMARY KEY REFERENCES token (id) ON DELETE CASCADE,
    revision               bigint NOT NULL,
    commit_time            timestamptz NOT NULL,
    -- NULL until the service has confirmed that no verifier can still answer VALID.
    effective_time         timestamptz,
    verifiers_acknowledged integer NOT NULL DEFAULT 0,
    verifiers_outwaited    integer NOT NULL DEFAULT 0
);
