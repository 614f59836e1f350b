"""`python -m ldm`: the command `ldm`."""

import sys

from ldm.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
