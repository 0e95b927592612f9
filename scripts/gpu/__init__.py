"""Parts of ``gpu_check.py``. They reach the worker's mathematics by path: where they run, nothing
need be installed."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
for _part in ("services/worker", "libs/contract", "libs/host", "libs/storage", "libs/tensor_codec"):
    sys.path.insert(0, str(_ROOT / _part / "src"))
