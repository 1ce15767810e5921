"""``python -m pyvmm.cli``."""

import sys

from pyvmm.cli import main

sys.exit(main())
