"""``python -m celo_nnx`` is the command ``celo-nnx``."""

import sys

from celo_nnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
