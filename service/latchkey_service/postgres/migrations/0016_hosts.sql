-- The processes of a host share one row and one lease.

-- How many processes the row represents, with the one that writes it. Releases that know only rows of
-- one process write 1.
ALTER TABLE verifier ADD COLUMN processes integer NOT NULL DEFAULT 1;
-- How many leases of the others ended while a revision waited for them.
ALTER TABLE verifier ADD COLUMN processes_outwaited bigint NOT NULL DEFAULT 0;
-- The others, for people: a list of objects.
ALTER TABLE verifier ADD COLUMN siblings jsonb NOT NULL DEFAULT '[]';
