"""``python -m cdistill``."""

import sys

from cdistill.cli import main

sys.exit(main())
