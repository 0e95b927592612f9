"""RawTensor: a tensor as dtype code, shape and bytes, needing neither NumPy nor torch until it is
converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._checks import check_dtype, check_nbytes, check_shape
from ._errors import UnsupportedTensor

if TYPE_CHECKING:
    import torch

    from ._numpy import Array


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's little-endian, C-ordered bytes with its safetensors dtype code, such as "BF16".

    Raises UnsupportedDtype, RankTooHigh, InvalidTensorEntry or ShapeMismatch when the three do not
    fit together.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        check_dtype(self.dtype, "the raw tensor")
        object.__setattr__(self, "shape", check_shape(self.shape, "the raw tensor"))
        view = memoryview(self.data)
        if not view.c_contiguous:
            raise UnsupportedTensor(
                "the raw tensor's data is not contiguous; give contiguous bytes"
            )
        check_nbytes(self.dtype, self.shape, view.nbytes, "the raw tensor")

    def numpy(self, *, widen: bool = False) -> Array:
        """A view of the data, read-only over bytes. BF16 raises NoNumpyDtype, or becomes float32
        with widen=True."""
        from ._numpy import byte_rows, to_numpy

        return to_numpy(
            byte_rows(self.data, self.shape), self.dtype, self.shape, "the raw tensor", widen=widen
        )

    def torch(self) -> torch.Tensor:
        """A CPU tensor over writable data; over read-only data (bytes) a copy, as torch knows no
        read-only tensors."""
        from ._numpy import byte_rows
        from ._torch import to_torch

        return to_torch(byte_rows(self.data, self.shape), self.dtype, self.shape)
