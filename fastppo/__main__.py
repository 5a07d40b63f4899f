"""`python -m fastppo`: the command line."""

import sys

from fastppo.cli import main

sys.exit(main())
