"""`python -m engram_jax`, the same as the console script `engram-jax`."""

import sys

from engram_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
