"""`python -m conddetr`, and `torchrun … -m conddetr`: the command line."""

import sys

from conddetr.cli import main

sys.exit(main())
