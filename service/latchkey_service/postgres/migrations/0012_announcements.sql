-- Reports of leaked secrets.

-- When somebody first reported the secret with ReportSecret or RevokeSecret. Verdicts do not depend
-- on it.
ALTER TABLE secret ADD COLUMN leak_report_time timestamptz;

-- Events for the webhook: written by the statement that makes the change, and removed once they are
-- delivered. Releases without a webhook write none.
CREATE TABLE webhook_event (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The same for each attempt, so that receivers recognise a repetition.
    message_id  uuid NOT NULL DEFAULT gen_random_uuid(),
    type        text COLLATE "C" NOT NULL,
    time        timestamptz NOT NULL,
    -- The token as it was then. It may be gone, or renamed, when the event is delivered.
    account_id  text COLLATE "C" NOT NULL,
    token_id    text COLLATE "C" NOT NULL,
    name        text NOT NULL,
    expire_time timestamptz,
    caller      text NOT NULL,
    attempts    integer NOT NULL DEFAULT 0,
    -- When the next attempt is due. While a worker delivers the event, the end of its claim.
    next_time   timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX webhook_event_due ON webhook_event (next_time);
CREATE INDEX webhook_event_age ON webhook_event (time);

-- The last announcement of each token's expiry. Without a foreign key, whose check would lock the
-- token's row: a Delete would wait for it.
CREATE TABLE expiry_notice (
    token_id    text COLLATE "C" PRIMARY KEY,
    -- The expiry that was announced. If it is moved, it is announced again.
    expire_time timestamptz NOT NULL,
    -- How many days before.
    days        integer NOT NULL
);

CREATE INDEX expiry_notice_age ON expiry_notice (expire_time);

-- Work that one worker of the fleet does at a time, and when it is due again.
CREATE TABLE upkeep_turn (
    task      text COLLATE "C" PRIMARY KEY,
    next_time timestamptz NOT NULL
);
