"""``python -m iscorrect``."""

import sys

from iscorrect.cli import main

sys.exit(main())
