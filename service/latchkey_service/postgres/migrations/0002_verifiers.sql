-- Verifiers: the server processes that may answer from their cache, and what each has confirmed.

-- A process registers here before its first read, renews its row while it runs, and removes the row
-- when it stops. A Delete waits for every row. The times are for people; no decision depends on the
-- database's clock.
CREATE TABLE verifier (
    id                    text COLLATE "C" PRIMARY KEY,
    -- Counts the registrations of one process, which registers again if its row was removed.
    incarnation           bigint NOT NULL,
    -- Increases by one with each renewal. If it does not change for the length of a lease, the
    -- process is dead.
    renewal               bigint NOT NULL DEFAULT 0,
    -- The process, and each client under its lease, has dropped all tokens that revisions up to
    -- this one named.
    acknowledged_revision bigint NOT NULL,
    lease_seconds         double precision NOT NULL,
    host                  text NOT NULL,
    process_id            integer NOT NULL,
    version               text NOT NULL,
    clients               integer NOT NULL DEFAULT 0,
    -- A value of the contract's enum Notifications.
    notifications         smallint NOT NULL DEFAULT 0,
    start_time            timestamptz NOT NULL DEFAULT clock_timestamp(),
    renew_time            timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The log no longer has the invalidations up to this revision. A process that has applied less than
-- that must start over.
ALTER TABLE head ADD COLUMN pruned_revision bigint NOT NULL DEFAULT 0;

-- Earlier releases had no cache, so their deletions took effect at the commit.
UPDATE deletion SET effective_time = commit_time WHERE effective_time IS NULL;
