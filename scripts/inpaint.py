#!/usr/bin/env python
"""The command `ldm inpaint`, run from this checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's ldm, whatever is installed
from ldm.cli.commands.generate import inpaint as main
from ldm.cli.commands.generate import inpaint_parser as parser

sys.path.pop(0)  # the rest is found through the package; the folder itself may be the user's
__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())
