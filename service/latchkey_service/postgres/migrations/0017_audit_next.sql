-- Batches of the audit log can only be added one after the other.

-- The service's role may insert batches. Without this check, one row with the highest number would
-- end the sealing for good, and one with a time far in the future would end retention. The function
-- names the schema, because a caller may have a temporary table of the same name.
DO $outer$
BEGIN
    EXECUTE format($inner$
        CREATE FUNCTION audit_next() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.number <> (SELECT coalesce(max(c.number), 0) + 1 FROM %I.audit_chain c)
               OR NEW.time > clock_timestamp() + interval '1 minute' THEN
                RAISE EXCEPTION 'not the next batch of the audit log'
                    USING ERRCODE = 'insufficient_privilege';
            END IF;
            RETURN NEW;
        END
        $$
    $inner$, current_schema());
END
$outer$;
CREATE TRIGGER audit_next_batch BEFORE INSERT ON audit_chain
    FOR EACH ROW EXECUTE FUNCTION audit_next();
