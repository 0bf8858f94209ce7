"""Random tries against an oracle, as long as one likes: `python -m tests.fuzz --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
