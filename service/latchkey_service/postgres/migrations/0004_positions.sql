-- Positions: a revision and a random mark (docs/protocol.md, rule 12).

-- A revision is a number in one history. A failover or a restore starts another history, which can
-- give the same number to another change. The transaction that takes a revision therefore also
-- writes a random mark, and readers compare both. 0 is never a mark: it stands for "not known".
--
-- UPDATE head SET revision = revision + 1, mark = DEFAULT makes a fresh one. The hash of a random
-- UUID needs no extension; gen_random_bytes() would.
--
-- A log entry whose token_id is empty names every token.
ALTER TABLE head
    ADD COLUMN mark bigint NOT NULL
        DEFAULT coalesce(nullif(uuid_hash_extended(gen_random_uuid(), 0), 0), 1),
    -- The mark of pruned_revision: a reader that has applied exactly that much need not start over.
    ADD COLUMN pruned_mark bigint NOT NULL DEFAULT 0;

-- The revisions so far have no marks, so all readers start over behind them.
DELETE FROM invalidation;
UPDATE head SET pruned_revision = revision, pruned_mark = mark;

-- The same for all tokens of a revision.
ALTER TABLE invalidation ADD COLUMN mark bigint NOT NULL;
-- 0: deleted before revisions had marks.
ALTER TABLE deletion ADD COLUMN mark bigint NOT NULL DEFAULT 0;

-- Clients of a verifier, for receipts and for people. Client libraries answer under its lease.
ALTER TABLE verifier
    -- How many had confirmed what the row acknowledged at its last renewal.
    ADD COLUMN clients_confirmed integer NOT NULL DEFAULT 0,
    -- How many leases of clients have ended while a revision waited for them. Only rises.
    ADD COLUMN clients_outwaited bigint NOT NULL DEFAULT 0,
    -- Callers and addresses of clients that a revision was waiting for.
    ADD COLUMN waiting_for text[] NOT NULL DEFAULT '{}',
    -- The server that the last renewal reached: the host of the list that it is, and what it says
    -- of itself.
    ADD COLUMN database_host text NOT NULL DEFAULT '',
    ADD COLUMN server_identifier text,
    ADD COLUMN server_timeline text,
    -- What a person should repair, a sentence each.
    ADD COLUMN warnings text[] NOT NULL DEFAULT '{}';
ALTER TABLE deletion
    ADD COLUMN clients_acknowledged integer NOT NULL DEFAULT 0,
    ADD COLUMN clients_outwaited integer NOT NULL DEFAULT 0;

-- Which server and which timeline a statement reached. Postgres starts a new timeline at each
-- promotion and at each point-in-time recovery. Engines that do not report them return NULL, and
-- then the marks alone tell histories apart. NULL on a standby, too.
--
-- pg_control_checkpoint() would show the new timeline only after the first checkpoint.
DO $$
BEGIN
    PERFORM pg_walfile_name(pg_current_wal_lsn());
    EXECUTE $f$
        CREATE FUNCTION server_timeline() RETURNS text LANGUAGE sql AS $s$
            SELECT CASE WHEN pg_is_in_recovery() THEN NULL
                        ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END
        $s$
    $f$;
EXCEPTION WHEN feature_not_supported OR undefined_function OR insufficient_privilege THEN
    EXECUTE 'CREATE FUNCTION server_timeline() RETURNS text LANGUAGE sql AS ''SELECT NULL::text''';
END
$$;

DO $$
BEGIN
    PERFORM system_identifier FROM pg_control_system();
    EXECUTE $f$
        CREATE FUNCTION server_identifier() RETURNS text LANGUAGE sql AS $s$
            SELECT system_identifier::text FROM pg_control_system()
        $s$
    $f$;
EXCEPTION WHEN feature_not_supported OR undefined_function OR insufficient_privilege THEN
    EXECUTE 'CREATE FUNCTION server_identifier() RETURNS text LANGUAGE sql AS ''SELECT NULL::text''';
END
$$;
