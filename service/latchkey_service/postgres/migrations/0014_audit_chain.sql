-- More of each entry, and a chain of batches that shows whether entries were changed or removed.

ALTER TABLE audit
    -- The person that the caller acts for, as the caller reports it. Empty: none.
    ADD COLUMN person text NOT NULL DEFAULT '' CHECK (char_length(person) <= 128),
    -- The client's address as the trusted proxy reports it. Empty: no proxy.
    ADD COLUMN client_address text NOT NULL DEFAULT '',
    -- The service's own id of the call. request_id may be the caller's.
    ADD COLUMN call_id text NOT NULL DEFAULT '';

-- The entries that no batch covers yet.
CREATE TABLE audit_unsealed (
    entry_id bigint PRIMARY KEY
);
INSERT INTO audit_unsealed SELECT id FROM audit;

-- Each batch covers some entries and, through its digest, all batches before it (audit/audit_chain.py).
CREATE TABLE audit_chain (
    number    bigint PRIMARY KEY CHECK (number > 0),
    entry_ids bigint[] NOT NULL,
    digest    bytea NOT NULL,
    -- The pepper from which the seal's key is derived.
    pepper_id text COLLATE "C" NOT NULL,
    seal      bytea NOT NULL,
    -- The time of its newest entry.
    time      timestamptz NOT NULL
);
CREATE TRIGGER audit_keep_chain BEFORE UPDATE OR DELETE ON audit_chain
    FOR EACH ROW EXECUTE FUNCTION audit_keep();
CREATE TRIGGER audit_keep_all BEFORE TRUNCATE ON audit_chain
    FOR EACH STATEMENT EXECUTE FUNCTION audit_keep();

-- The last batch whose entries retention has removed; 0: none. Its row in audit_chain stays.
CREATE TABLE audit_start (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    number    bigint NOT NULL,
    pepper_id text COLLATE "C",
    seal      bytea
);
INSERT INTO audit_start (number) VALUES (0);

-- The two functions run with the rights of the tables' owner, so that the service's role needs none
-- beyond INSERT (docs/postgres.md). Such a function must not find tables of others first, not even
-- temporary ones. This one names the schema, because setting a path takes some of a Delete's time.
DO $outer$
BEGIN
    EXECUTE format($inner$
        CREATE FUNCTION audit_queue() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            INSERT INTO %I.audit_unsealed (entry_id) VALUES (NEW.id);
            RETURN NULL;
        END
        $$
    $inner$, current_schema());
END
$outer$;
CREATE TRIGGER audit_queue_new AFTER INSERT ON audit
    FOR EACH ROW EXECUTE FUNCTION audit_queue();

-- Removes the entries of the batches up to `last`, if all of them are older than `before`. Returns how
-- many. `new_seal` proves that a holder of the pepper has removed them.
CREATE FUNCTION audit_prune(before timestamptz, last bigint, new_pepper_id text, new_seal bytea)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    first bigint;
    removed bigint;
BEGIN
    IF before > clock_timestamp() - interval '1 day' THEN
        RAISE EXCEPTION 'the audit table keeps entries for one day at least'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    SELECT s.number INTO first FROM audit_start s FOR UPDATE;
    IF last <= first
       OR NOT EXISTS (SELECT FROM audit_chain c WHERE c.number = last)
       OR EXISTS (SELECT FROM audit_chain c
                   WHERE c.number > first AND c.number <= last AND c.time >= before) THEN
        RETURN 0;
    END IF;
    PERFORM set_config('latchkey.audit_retention', 'on', true);
    DELETE FROM audit a
     WHERE a.id IN (SELECT unnest(c.entry_ids) FROM audit_chain c
                     WHERE c.number > first AND c.number <= last);
    GET DIAGNOSTICS removed = ROW_COUNT;
    DELETE FROM audit_chain c WHERE c.number < last;
    UPDATE audit_start SET number = last, pepper_id = new_pepper_id, seal = new_seal;
    PERFORM set_config('latchkey.audit_retention', '', true);
    RETURN removed;
END
$$;

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION audit_prune(timestamptz, bigint, text, bytea)'
                   ' SET search_path = %I, pg_temp', current_schema());
END
$$;
REVOKE EXECUTE ON FUNCTION audit_queue() FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION audit_prune(timestamptz, bigint, text, bytea) FROM PUBLIC;
