"""The good search of the conformance tests, for tests of what searches stand on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))
from good_parts import SEARCH as SEARCH
