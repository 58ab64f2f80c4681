"""`python -m minirec.tools.cli`, and what torchrun starts."""

import sys

from minirec.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
