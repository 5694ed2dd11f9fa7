"""``python -m migrationd``."""

import sys

from migrationd.cli import main

sys.exit(main())
