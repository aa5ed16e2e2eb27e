-- Reports of leaked secrets.

-- When somebody first reported the secret with ReportSecret or RevokeSecret. Verdicts do not depend
-- on it.
ALTER TABLE secret ADD COLUMN leak_report_time timestamptz;
