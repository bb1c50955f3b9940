"""`python -m forgather_ckpt.cli` is `fgckpt`."""

import sys

from forgather_ckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
