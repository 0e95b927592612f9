"""Quantised folders: weights made whole by their scales; refused where that is not known here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.weights import FLOAT_DTYPES, FolderReader, what_is_wrong
from nexrl_worker.training.transformers_parts import convert_moe_packed_tensors

NO_WEIGHTS = r"(^|\.)(input|activation|output|prob_output|[kvq]|kv)_scale(_ub|_inv)?$"
"""Scales of activations and caches: engines that compute in 8 bits need them, weights do not."""
_METHODS = ("fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors", "modelopt", "bitsandbytes")
# Of compressed-tensors, those that pack no two numbers into one; where a folder mixes them, each of
# its groups has one.
_FORMATS = {
    *("dense", "naive-quantized", "int-quantized", "float-quantized", "mxfp8-quantized"),
    "mixed-precision",
}
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_INT8_LIMIT = 127.0
_PAIR = ("_blocks", "_scales")  # of mxfp4: two numbers in each byte, and exponents


def quantisation(folder: Path) -> dict[str, Any] | None:
    """What `config.json` says of a quantisation, None of none. Raises InvalidValue."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        inner = [part for name, part in config.items() if name.endswith("_config")]
        parts = [config, *(part for part in inner if isinstance(part, dict))]
    except (OSError, ValueError, TypeError, AttributeError):
        why = f": {found}" if (found := what_is_wrong(path)) else ""
        raise InvalidValue(f"{path} is not a model's configuration{why}") from None
    keys = ("quantization_config", "compression_config")
    said = [part.get(key) for part in parts for key in keys]
    said = [one for one in said if one is not None and one != {}]
    if not all(isinstance(one, dict) for one in said):
        message = f"{path}: quantization_config is no mapping"
        raise InvalidValue(message, tensor="quantization_config")
    return dict(said[0]) if said else None


def method_of(said: Mapping[str, Any]) -> str:
    """The method's name; raises InvalidValue where its weights cannot be made whole here."""
    usual = "bitsandbytes" if said.get("load_in_8bit") else "unknown"
    method = str(said.get("quant_method") or usual)
    if said.get("load_in_4bit"):
        method = "bitsandbytes 4-bit"
    if said.get("transform_config"):
        method += " with transforms"
    packed = [kind for kind in _formats(said) if kind not in _FORMATS]
    if packed:
        method += f" {packed[0]}"
    if method not in _METHODS:
        message = (
            f"quantization_config says {method}: such weights are not de-quantised here; save "
            "them as bfloat16"
        )
        known = ", ".join(_METHODS)
        raise InvalidValue(message, tensor="quantization_config", expected=known, actual=method)
    return method


def _formats(said: Mapping[str, Any]) -> list[str]:
    """The formats of compressed-tensors that a configuration names."""
    groups = said.get("config_groups")
    inner = groups.values() if isinstance(groups, dict) else ()
    parts = [said, *inner, said.get("sparsity_config")]
    return [str(part["format"]) for part in parts if isinstance(part, dict) and part.get("format")]


@dataclass(frozen=True)
class _Scale:
    """`block`: the rows and columns that share one scale; the scale's numbers are divided by
    `over`.

    `zero`: the tensor, of the scale's shape, of what is subtracted before.
    """

    name: str
    block: tuple[int, int]
    over: float = 1.0
    zero: str | None = None


class Dequantised:
    """A folder's tensors with the quantised ones made whole, in float32: each number times its
    block's scale.

    `said`: what its configuration says of the quantisation. Raises InvalidValue naming the tensor
    or the method.
    """

    def __init__(self, folder: FolderReader, said: Mapping[str, Any] | None) -> None:
        self._folder = folder
        self.method = None if said is None else method_of(said)
        self._declared = _declared_block(said or {})
        self._scales: dict[str, _Scale] = {}
        dropped: set[str] = set()
        for name, code in folder.dtypes.items():
            found = self._scale_of(name, code)
            if found is not None:
                self._scales[name] = found
                dropped |= {found.name, found.zero or found.name}
        dropped |= self._row_orders() if self.method == "bitsandbytes" else set()
        self._pairs = self._packed_pairs() if self.method == "mxfp4" else {}
        dropped |= {name + end for name in self._pairs for end in _PAIR}
        kept = {name: shape for name, shape in folder.shapes.items() if name not in dropped}
        self.shapes = kept | self._pairs
        made = self._scales.keys() | self._pairs.keys()
        self.dtypes = {name: "F32" if name in made else folder.dtypes[name] for name in self.shapes}

    @property
    def stored(self) -> dict[str, str]:
        """`dtypes` as the files have them, without the scales."""
        return {
            name: self._folder.dtypes[name + _PAIR[0] * (name in self._pairs)]
            for name in self.shapes
        }

    def has(self, name: str) -> bool:
        """Whether the folder holds the tensor."""
        return name in self.shapes

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows `offset:offset + length` along dim 0 (all of a 0-dim tensor)."""
        if name in self._pairs:
            blocks, exponents = (self._folder.read(name + end, offset, length) for end in _PAIR)
            return convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
        rows = self._folder.read(name, offset, length)
        scale = self._scales.get(name)
        if scale is None:
            return rows
        numbers, at = rows.float(), (scale.block, self.shapes[name], offset, length)
        if scale.zero is not None:
            numbers -= self._spread(scale.zero, *at)
        return numbers * (self._spread(scale.name, *at) / scale.over)

    def close(self) -> None:
        """Unmap the files."""
        self._folder.close()

    def _scale_of(self, name: str, code: str) -> _Scale | None:
        """None of a tensor that is not quantised, or by nothing known: no parameter takes that."""
        if code in _FLOAT8:
            ends = (end for end in ("_scale_inv", "_scale") if self._folder.has(name + end))
            end = next(ends, None)
            if end is None or self.method is None:
                scaled = "config.json has no quantization_config"
                why = scaled if end else "there is no scale beside it"
                message = f"{name} is {code}, quantised, but {why}"
                raise InvalidValue(message, tensor=name, actual=code)
            return _Scale(name + end, self._block(name, name + end))
        if code == "I8" and self.method == "bitsandbytes":
            found = name.removesuffix("weight") + "SCB"
            if self._folder.has(found):
                return _Scale(found, self._block(name, found), over=_INT8_LIMIT)
        if code == "I8" and self.method == "compressed-tensors":
            found = name + "_scale"
            if self._folder.has(found):
                return _Scale(found, self._block(name, found), zero=self._zero(name))
        return None

    def _zero(self, name: str) -> str | None:
        zero, scale, folder = name + "_zero_point", name + "_scale", self._folder
        if not folder.has(zero):
            return None
        if folder.shapes[zero] != folder.shapes[scale] or folder.dtypes[zero] != "I8":
            message = f"{zero} is not one 8-bit integer for each number of {scale}"
            raise InvalidValue(message, tensor=zero)
        return zero

    def _packed_pairs(self) -> dict[str, tuple[int, ...]]:
        """Shapes [E,H,O] of experts stored as [E,O,H/32,16] pairs of numbers and exponents."""
        shapes, dtypes = self._folder.shapes, self._folder.dtypes
        found: dict[str, tuple[int, ...]] = {}
        for blocks in (name for name in shapes if name.endswith(_PAIR[0])):
            name = blocks.removesuffix(_PAIR[0])
            scales, shape = name + _PAIR[1], shapes[blocks]
            fits = len(shape) == 4 and shapes.get(scales) == shape[:-1]
            if not fits or {dtypes[blocks], dtypes[scales]} != {"U8"}:
                message = f"{blocks} and {scales} are no experts in mxfp4 as they are known here"
                raise InvalidValue(message, tensor=blocks)
            found[name] = (shape[0], 2 * shape[2] * shape[3], shape[1])
        return found

    def _block(self, name: str, scale: str) -> tuple[int, int]:
        shape, grid = self._folder.shapes[name], self._folder.shapes[scale]
        code = self._folder.dtypes[scale]
        if code not in (*FLOAT_DTYPES, "F8_E8M0", "U8"):
            raise InvalidValue(f"{scale} is {code}, no scale that is known here", tensor=scale)
        if len(shape) >= 2:
            rows, columns = shape[-2:]
            if math.prod(grid) == 1:
                return rows, columns
            if grid in ((rows,), (rows, 1)) and len(shape) == 2:
                return 1, columns
            if len(grid) == len(shape) and grid[:-2] == shape[:-2]:
                even = (rows // max(grid[-2], 1), columns // max(grid[-1], 1))
                for block in (self._declared, even):
                    if block and min(block) and _grid(rows, columns, block) == grid[-2:]:
                        return block
        message = f"{scale} of shape {list(grid)} does not go with {name} of shape {list(shape)}"
        raise InvalidValue(message, tensor=scale)

    def _row_orders(self) -> set[str]:
        """How bitsandbytes laid out its rows: names that say so, all of them row after row."""
        scales = (name for name in self._folder.shapes if name.endswith("SCB"))
        names = {name.removesuffix("SCB") + "weight_format" for name in scales}
        there = {name for name in names if self._folder.has(name)}
        for name in sorted(there):
            if int(self._folder.read(name, 0, 1)):
                message = f"{name} is not 0: rows in another order than their own"
                raise InvalidValue(message, tensor=name)
        return there

    def _spread(
        self,
        grid_name: str,
        block: tuple[int, int],
        shape: tuple[int, ...],
        offset: int,
        length: int,
    ) -> Tensor:
        """A number of that grid for each of those rows' numbers, or what spreads to it."""
        grid = self._folder.shapes[grid_name]
        stored = self._folder.read(grid_name, 0, grid[0] if grid else 1)
        found = stored.float()
        if stored.dtype == torch.uint8:
            found = (found - _INT8_LIMIT).exp2()
        if found.numel() == 1:
            return found.reshape(())
        if len(shape) == 2:
            found = found.reshape(grid[0], -1)
            rows = torch.arange(offset, offset + length) // block[0]
        else:
            found = found[offset : offset + length]
            rows = torch.arange(shape[-2]) // block[0]
        columns = torch.arange(shape[-1]) // block[1]
        return found.index_select(-2, rows).index_select(-1, columns)


def _declared_block(said: Mapping[str, Any]) -> tuple[int, int] | None:
    groups = said.get("config_groups")
    given = [said.get("weight_block_size")]
    if isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        given += [one.get("block_structure") for one in weights if isinstance(one, dict)]
    for block in given:
        match block:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    return None


def _grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks there are along each side."""
    return -(-rows // block[0]), -(-columns // block[1])
