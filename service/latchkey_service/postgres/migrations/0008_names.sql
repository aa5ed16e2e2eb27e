-- Names that look the same count as the same: the key of a name no longer has characters that leave
-- no mark, and has one form of each compatible character (tokens/names.py).

-- The previous release still writes keys of the old form. Its names are compared by that form until
-- it is gone, so the index needs no change.

-- Plain ASCII keys have both forms. Of names that look the same already, the one with the new form
-- or the oldest gets it, and the others keep theirs: nobody loses a token, and no new one joins them.
-- In other encodings than UTF-8, Postgres cannot normalize; there, old names keep their keys.
DO $$
BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RETURN;
    END IF;
    WITH changed AS (
        SELECT id, account_id, create_time, new_key
          FROM (SELECT id, account_id, create_time, name_key,
                       btrim(regexp_replace(lower(normalize(regexp_replace(name_key,
                           '[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f'
                           '\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff'
                           '\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a'
                           '\U000e0000-\U000e0fff]+', '', 'g'),
                           NFKC)), '\s+', ' ', 'g')) AS new_key
                  FROM token
                 WHERE delete_time IS NULL AND name_key ~ '[^ -~]|  ') AS keyed
         WHERE new_key <> name_key AND new_key <> ''),
    first AS (
        SELECT DISTINCT ON (account_id, new_key) id, new_key
          FROM changed c
         WHERE NOT EXISTS (SELECT FROM token o
                            WHERE o.account_id = c.account_id AND o.name_key = c.new_key
                              AND o.delete_time IS NULL)
         ORDER BY account_id, new_key, create_time, id)
    UPDATE token t SET name_key = first.new_key FROM first WHERE t.id = first.id;
END
$$;
