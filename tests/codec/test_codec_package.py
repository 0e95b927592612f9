"""What the package shows, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import tensor_codec


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_all_is_what_is_public() -> None:
    """`__all__` lists each public name, once, and nothing else."""
    public = {
        name
        for name, value in vars(tensor_codec).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(tensor_codec.__all__) == public and len(tensor_codec.__all__) == len(public)


def test_import_and_header_need_neither_torch_nor_numpy() -> None:
    """Importing, encoding raw tensors, parsing headers and JSON load neither library."""
    code = """
import sys
import tensor_codec as tc
raw = tc.RawTensor("BF16", (2,), b"abcd")
data = tc.encode({"x": raw}, {"k": "v"}).tobytes()
header = tc.parse_header(data, len(data))
assert tc.from_json(tc.to_json(raw)).data == b"abcd" and tc.wrap(data).header == header
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    assert run(code) == "False False"


def test_numpy_work_does_not_import_torch() -> None:
    """Arrays are encoded and read without torch."""
    code = """
import sys
import numpy as np, tensor_codec as tc
assert tc.wrap(tc.encode({"x": np.arange(3)}).tobytes()).numpy("x", [2]).tolist() == [2]
print("torch" in sys.modules)
"""
    assert run(code) == "False"
