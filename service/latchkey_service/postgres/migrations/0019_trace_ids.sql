-- Audit entries name the trace of their call.

ALTER TABLE audit
    -- 32 hexadecimal digits (W3C Trace Context). Empty: the call had no trace.
    ADD COLUMN trace_id text COLLATE "C" NOT NULL DEFAULT '' CHECK (trace_id ~ '^([0-9a-f]{32})?$');
