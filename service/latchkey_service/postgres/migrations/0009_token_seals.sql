-- Tokens' own rows are sealed, so that a change of a token without a working secret does not seal what
-- somebody else has written into its row.

ALTER TABLE token
    -- HMAC over what the verdicts on the token's secrets depend on. The key is derived from the pepper
    -- `seal_pepper_id`. NULL: not sealed yet. Empty: deleted, or not genuine when it was to be sealed.
    ADD COLUMN seal           bytea,
    ADD COLUMN seal_pepper_id text COLLATE "C";

-- For sealing the rows of earlier releases.
CREATE INDEX token_unsealed ON token (id) WHERE seal IS NULL AND delete_time IS NULL;

-- HMAC with a key derived from this pepper: proof that every token was sealed. From then on, only the
-- seal of one of its secrets can show that a token without a seal is genuine.
ALTER TABLE pepper ADD COLUMN tokens_sealed bytea;

-- The previous release changes and deletes tokens without a new seal. The seal of such a token would be
-- wrong, and this release would refuse to change it: it counts as not sealed yet. A later release may
-- drop this trigger, once no host runs the previous one.
CREATE FUNCTION token_unseal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.seal := CASE WHEN NEW.delete_time IS NULL THEN NULL ELSE ''::bytea END;
    RETURN NEW;
END
$$;

CREATE TRIGGER token_unseal
    BEFORE UPDATE OF scope, expire_time, disable_time, allowed_networks, permissions, delete_time
    ON token FOR EACH ROW
    WHEN (OLD.seal <> '' AND NEW.seal = OLD.seal AND (
        NEW.scope <> OLD.scope
        OR NEW.expire_time IS DISTINCT FROM OLD.expire_time
        OR (NEW.disable_time IS NULL) <> (OLD.disable_time IS NULL)
        OR NEW.allowed_networks <> OLD.allowed_networks
        OR NEW.permissions <> OLD.permissions
        OR (NEW.delete_time IS NULL) <> (OLD.delete_time IS NULL)))
    EXECUTE FUNCTION token_unseal();
