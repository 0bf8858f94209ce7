"""``python -m iscorrect``."""

import sys

from iscorrect.cli.main import main

sys.exit(main())
