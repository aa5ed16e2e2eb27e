-- The peppers of each verifier, to detect hosts with different peppers.

-- Ids only, the newest pepper first. Empty if the release does not report its peppers.
ALTER TABLE verifier ADD COLUMN pepper_ids text[] COLLATE "C" NOT NULL DEFAULT '{}';
