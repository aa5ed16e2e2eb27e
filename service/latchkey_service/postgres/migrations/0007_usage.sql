-- Uses of tokens: when, by whom, and how often verifies answered VALID.

-- These tables have no foreign keys. A foreign key would lock the token's row, and Deletes would
-- wait for it.

-- When each caller first and last used each secret. The rows go with the token's tombstone.
CREATE TABLE token_usage (
    token_id   text COLLATE "C" NOT NULL,
    -- The hint of the secret. Empty if it is not known.
    hint       text COLLATE "C" NOT NULL,
    -- The caller's name in the policy. Empty if there is no policy.
    caller     text COLLATE "C" NOT NULL,
    first_time timestamptz NOT NULL,
    last_time  timestamptz NOT NULL,
    PRIMARY KEY (token_id, hint, caller)
-- Room on each page for new versions of its rows, which then need no new index entries.
) WITH (fillfactor = 70);

-- How often on each day, in UTC. Old days are removed.
CREATE TABLE token_usage_day (
    token_id text COLLATE "C" NOT NULL,
    caller   text COLLATE "C" NOT NULL,
    day      date NOT NULL,
    count    bigint NOT NULL CHECK (count > 0),
    PRIMARY KEY (token_id, caller, day)
) WITH (fillfactor = 70);

CREATE INDEX token_usage_day_day ON token_usage_day (day);

-- The last batch that each server process has written, so that a repeated batch counts once.
CREATE TABLE token_usage_writer (
    writer     text COLLATE "C" PRIMARY KEY,
    number     bigint NOT NULL,
    write_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
