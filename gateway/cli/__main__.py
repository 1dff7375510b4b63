"""`python -m gateway.cli`, which the supervisor runs: it needs no script on the PATH."""

import sys

from gateway.cli import main

sys.exit(main())
