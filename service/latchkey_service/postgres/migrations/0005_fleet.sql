-- The peppers of each verifier, so that hosts with different peppers can be found.

-- Ids only, the newest pepper first. Empty for a release that does not report its peppers.
ALTER TABLE verifier ADD COLUMN pepper_ids text[] COLLATE "C" NOT NULL DEFAULT '{}';
