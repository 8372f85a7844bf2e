"""Makes the modules of ``bench/gpu_suite.py`` importable, as they are where it is run."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
