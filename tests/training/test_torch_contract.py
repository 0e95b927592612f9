"""What torch_parts.py takes for granted of torch beyond its documented interface, and that nobody
else does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from nexrl_worker.training import torch_parts

PRIVATE = re.compile(r"torch\._(?!_)|torch\.utils\._")


def test_nobody_else_knows_the_private_parts() -> None:
    folder = Path(torch_parts.__file__).parents[1]
    files = [path for path in folder.rglob("*.py") if path.name != "torch_parts.py"]
    assert [path.name for path in files if PRIVATE.search(path.read_text())] == []


def test_a_limit_of_compiled_forms_holds_inside_a_block_alone() -> None:
    before = torch._dynamo.config.recompile_limit
    with torch_parts.compiled_forms(before + 5):
        assert torch._dynamo.config.recompile_limit == before + 5
    assert torch._dynamo.config.recompile_limit == before


def test_norms_of_many_tensors_are_those_of_each() -> None:
    tensors = [torch.arange(5.0), torch.ones(2, 3)]
    wanted = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    assert torch.allclose(torch_parts.norms(tensors), wanted)


def test_a_compiler_is_looked_for_where_the_device_needs_one() -> None:
    assert torch_parts.missing_compiler(torch.device("cpu")) in (
        None,
        "a C++ compiler (install g++, or name one in CXX)",
    )
