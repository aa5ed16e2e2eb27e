-- The orders of List other than newest first: by expiry, and by last use.

-- Tokens that never expire come last. A list with this order reads one range of this index.
CREATE INDEX token_list_expiry
    ON token (account_id, coalesce(expire_time, 'infinity'::timestamptz), id)
    WHERE delete_time IS NULL;

-- One row for each live token, with the time of its last use to within a minute; '-infinity' exactly
-- if no use is recorded. Never later than the last use in token_usage, which is exact and decides
-- about filters.
--
-- A separate table, because recording a use must not lock the token's row: Deletes would wait for
-- it. For the same reason, there is no foreign key.
CREATE TABLE token_last_use (
    token_id       text COLLATE "C" PRIMARY KEY,
    account_id     text COLLATE "C" NOT NULL,
    last_used_time timestamptz NOT NULL
);

CREATE INDEX token_list_last_use ON token_last_use (account_id, last_used_time, token_id);

INSERT INTO token_last_use (token_id, account_id, last_used_time)
SELECT t.id, t.account_id,
       coalesce((SELECT max(u.last_time) FROM token_usage u WHERE u.token_id = t.id), '-infinity')
  FROM token t
 WHERE t.delete_time IS NULL;

-- Triggers keep the rows, so that tokens that the previous release creates are listed too.
CREATE FUNCTION token_last_use_add() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO token_last_use (token_id, account_id, last_used_time)
    SELECT id, account_id, '-infinity' FROM added WHERE delete_time IS NULL
        ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

-- A row that the recording of a use has locked stays: a Delete does not wait for it. List skips it,
-- and it goes with the token's tombstone.
CREATE FUNCTION token_last_use_remove() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM token_last_use
     WHERE token_id = (SELECT token_id FROM token_last_use WHERE token_id = OLD.id
                          FOR UPDATE SKIP LOCKED);
    RETURN NULL;
END
$$;

-- The previous release records uses in token_usage alone. In this release, the statement that records
-- a use has changed the row already, so this finds nothing to do. In the order of their ids, like
-- that statement, so that two of them do not wait for each other.
CREATE FUNCTION token_last_use_begin() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM token_last_use
      WHERE token_id IN (SELECT token_id FROM added) AND last_used_time = '-infinity'
      ORDER BY token_id FOR UPDATE;
    UPDATE token_last_use o SET last_used_time = u.last_time
      FROM (SELECT token_id, max(last_time) AS last_time FROM added GROUP BY token_id) u
     WHERE o.token_id = u.token_id AND o.last_used_time = '-infinity';
    RETURN NULL;
END
$$;

CREATE TRIGGER token_last_use_begin AFTER INSERT ON token_usage
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION token_last_use_begin();
CREATE TRIGGER token_last_use_add AFTER INSERT ON token
    REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION token_last_use_add();
CREATE TRIGGER token_last_use_remove AFTER UPDATE OF delete_time ON token
    FOR EACH ROW WHEN (OLD.delete_time IS NULL AND NEW.delete_time IS NOT NULL)
    EXECUTE FUNCTION token_last_use_remove();
CREATE TRIGGER token_last_use_purge AFTER DELETE ON token
    FOR EACH ROW EXECUTE FUNCTION token_last_use_remove();
