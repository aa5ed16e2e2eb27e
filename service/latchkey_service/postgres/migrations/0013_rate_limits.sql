-- How often a token may be used, and how much of that is left.

-- The previous release ignores these columns, so the service refuses limits while a verifier with
-- rules < 3 is registered. The seal of a token with a limit includes it.
ALTER TABLE token
    ADD COLUMN rate_count          integer CHECK (rate_count BETWEEN 1 AND 1000000),
    ADD COLUMN rate_period_seconds integer CHECK (rate_period_seconds IN (1, 60, 3600)),
    ADD COLUMN rate_burst          integer CHECK (rate_burst BETWEEN 1 AND 1000000),
    ADD CONSTRAINT token_rate CHECK (
        num_nonnulls(rate_count, rate_period_seconds, rate_burst) IN (0, 3));

-- The bucket of each limited token that was used lately. No row stands for a full bucket.
--
-- Without a foreign key, so that no Delete waits for the lock of a row.
CREATE TABLE rate_use (
    token_id text COLLATE "C" PRIMARY KEY,
    -- When the bucket will be full, in microseconds of Unix time on the database's clock.
    full_at  bigint NOT NULL,
    -- The last draw: the limit under which it was made (the period in microseconds), how many calls
    -- were asked for, and how many were issued.
    count    bigint NOT NULL,
    period   bigint NOT NULL,
    burst    bigint NOT NULL,
    needed   bigint NOT NULL,
    ahead    bigint NOT NULL,
    calls    bigint NOT NULL
) WITH (fillfactor = 50);

