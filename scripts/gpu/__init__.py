"""Parts of ``gpu_check.py``. They reach the worker's mathematics by path: where they run, nothing need be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "services" / "worker" / "src"))
