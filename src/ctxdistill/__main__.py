"""`python -m ctxdistill` is the command line."""

import sys

from ctxdistill.cli import main

sys.exit(main())
