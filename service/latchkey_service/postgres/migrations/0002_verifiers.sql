-- Verifiers: the server processes that may answer from memory, and what each has confirmed.

-- A process registers here before its first read, renews while it lives, and removes its row when it
-- stops. A Delete waits for every row. The times are for people: no decision is made by a clock of
-- the database's.
CREATE TABLE verifier (
    id                    text COLLATE "C" PRIMARY KEY,
    -- Counts the registrations of one process: a row that was removed is registered anew.
    incarnation           bigint NOT NULL,
    -- One more with each renewal. Whoever has seen it unchanged for a lease's length knows the row
    -- to be dead.
    renewal               bigint NOT NULL DEFAULT 0,
    -- The process, and each client under its lease, has dropped what revisions up to this named.
    acknowledged_revision bigint NOT NULL,
    lease_seconds         double precision NOT NULL,
    host                  text NOT NULL,
    process_id            integer NOT NULL,
    version               text NOT NULL,
    clients               integer NOT NULL DEFAULT 0,
    -- As in the contract's Notifications.
    notifications         smallint NOT NULL DEFAULT 0,
    start_time            timestamptz NOT NULL DEFAULT clock_timestamp(),
    renew_time            timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The invalidations up to this revision have been removed from the log: who has applied less than
-- that begins anew.
ALTER TABLE head ADD COLUMN pruned_revision bigint NOT NULL DEFAULT 0;

-- Deletions of releases that answered nothing from memory took effect when they were committed.
UPDATE deletion SET effective_time = commit_time WHERE effective_time IS NULL;
