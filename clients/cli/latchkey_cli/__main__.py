"""Entry point: `python -m latchkey_cli`."""

import sys

from latchkey_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
