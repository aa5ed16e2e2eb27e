"""`python -m tests.history.worker`: a worker of the shipped service, or one with a rule removed.

With the argument `supervisor`, the shipped service with all its workers.
"""

import signal
import sys

from latchkey_service.__main__ import main

from tests.helpers.child_processes import end_with_parent
from tests.history.broken import VARIABLE, break_rule, rule_to_break

if __name__ == "__main__":
    if sys.argv[1:] == ["supervisor"]:
        if rule_to_break() is not None:
            raise SystemExit(f"{VARIABLE} does not reach the workers of a supervisor")
        # A graceful end, because it has workers to stop.
        end_with_parent(signal.SIGTERM)
        sys.exit(main([]))
    end_with_parent()
    break_rule(rule_to_break())
    sys.exit(main(["worker"]))
