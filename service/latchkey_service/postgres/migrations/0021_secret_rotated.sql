-- Finding tokens with old secrets searches a small index, without the first secret of each token.
-- Releases from schema 0010 work with this.
-- This release works without it too.

-- A token's first secret is as old as the token. Only those that replaced it have an ordinal.
CREATE INDEX secret_rotated ON secret (token_id, create_time) WHERE ordinal > 0;
