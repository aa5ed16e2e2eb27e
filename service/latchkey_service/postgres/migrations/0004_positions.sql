-- Positions: a revision and a random mark (docs/protocol.md, rule 12).

-- A revision is a number in one history. A failover or a restore starts another history, which can
-- give the same number to another change. The transaction that takes a revision therefore also
-- writes a random mark, and readers compare both. A mark is never 0, which means "not known".
--
-- UPDATE head SET revision = revision + 1, mark = DEFAULT generates a new mark. The hash of a
-- random UUID needs no extension; gen_random_bytes() would.
--
-- A log entry whose token_id is empty names every token.
ALTER TABLE head
    ADD COLUMN mark bigint NOT NULL
        DEFAULT coalesce(nullif(uuid_hash_extended(gen_random_uuid(), 0), 0), 1),
    -- The mark of pruned_revision. A reader that has applied exactly that revision need not start
    -- over.
    ADD COLUMN pruned_mark bigint NOT NULL DEFAULT 0;

-- Existing revisions have no marks, so all readers must start over after them.
DELETE FROM invalidation;
UPDATE head SET pruned_revision = revision, pruned_mark = mark;

-- All tokens of a revision have the same mark.
ALTER TABLE invalidation ADD COLUMN mark bigint NOT NULL;
-- 0 for deletions made before revisions had marks.
ALTER TABLE deletion ADD COLUMN mark bigint NOT NULL DEFAULT 0;

-- Client libraries that answer verifies under the lease of a verifier, for receipts and for people.
ALTER TABLE verifier
    -- Clients that had confirmed the acknowledged revision at the last renewal.
    ADD COLUMN clients_confirmed integer NOT NULL DEFAULT 0,
    -- Client leases that expired while a revision waited for them. Never decreases.
    ADD COLUMN clients_outwaited bigint NOT NULL DEFAULT 0,
    -- Callers and addresses of the clients that a revision was waiting for.
    ADD COLUMN waiting_for text[] NOT NULL DEFAULT '{}',
    -- The server that the last renewal reached: its host in the database URL, and what it reports
    -- about itself.
    ADD COLUMN database_host text NOT NULL DEFAULT '',
    ADD COLUMN server_identifier text,
    ADD COLUMN server_timeline text,
    -- Faults that a person should repair, one sentence each.
    ADD COLUMN warnings text[] NOT NULL DEFAULT '{}';
ALTER TABLE deletion
    ADD COLUMN clients_acknowledged integer NOT NULL DEFAULT 0,
    ADD COLUMN clients_outwaited integer NOT NULL DEFAULT 0;

-- These functions return the timeline and the identifier of the server that runs the statement.
-- Postgres starts a new timeline at each promotion and each point-in-time recovery. On engines that
-- do not report them, the functions return NULL and only the marks distinguish histories. The
-- timeline is also NULL on a standby.
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
