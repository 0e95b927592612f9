"""What this service uses of torch beyond its documented interface, FSDP2 apart (fsdp2.py).

tests/training/test_torch_contract.py says what each part promises.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compiled_forms(most: int) -> AbstractContextManager[None]:
    """Inside, a compiled function may have that many forms before torch goes on uncompiled."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=most)
    return patched


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, None if it lacks nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton"
        # Triton builds in C what starts its kernels.
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if found else "a C compiler (install gcc, or name one in CC)"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (install g++, or name one in CXX)"
    return None


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of the tensors, in one kernel on a GPU: one number for each."""
    return torch.stack(torch._foreach_norm(list(tensors)))
