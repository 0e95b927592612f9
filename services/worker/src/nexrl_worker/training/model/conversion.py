"""Between a model in memory and its folder, by transformers' own conversions, forwards and back.

At load transformers 5 renames tensors, stacks the experts of a layer into one, cuts fused ones
apart; `save_pretrained` undoes what it did. Both go here by groups of tensors that one conversion
needs together: never the whole model at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.weights import FLOAT_DTYPES
from nexrl_worker.training.transformers_parts import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    conversions_of,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
    set_conversions,
)


class FolderTensors(Protocol):
    """Rows of the tensors that a folder's files hold, by their names there; `shapes` are the whole
    ones.

    `dtypes` are safetensors' names of theirs.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def has(self, name: str) -> bool: ...
    def read(self, name: str, offset: int, length: int) -> Tensor: ...
    def close(self) -> None: ...


@dataclass
class _Group:
    """Tensors that are converted together: `sources` are (name, pattern of the converter)."""

    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)


class Conversion:
    """What transformers makes of a folder with tensors of these `names`, for the model `hf`."""

    def __init__(self, hf: Any, names: Iterable[str]) -> None:
        self._hf = hf
        mapping = get_model_conversion_mapping(self._hf)
        renamings, converters = _split(mapping)
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        known = dict.fromkeys(hf.state_dict(keep_vars=True), True)
        prefix = self._hf.base_model_prefix
        self.groups: dict[str, _Group] = {}
        self.unused: dict[str, str] = {}
        """Tensors that the model does not take: theirs in the folder -> the name it would have."""
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target not in known:
                self.unused[name] = target
                continue
            converter = None if pattern is None else by_pattern[pattern]
            group = self.groups.setdefault(target, _Group(converter))
            group.sources.append((name, name if pattern is None else pattern))
        self.used = [transform for transform in mapping if transform.was_used()]

    def convert(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's tensors that the group of `first` becomes; `read` gives the folder's whole
        tensors."""
        group = self.groups[first]
        if group.converter is None:
            return {first: read(group.sources[-1][0])}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(first, name, pattern, read(name))  # type: ignore[arg-type]  # or a future of one
        made = converter.convert(first, model=self._hf, config=self._hf.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


class ConvertingReader:
    """A folder's tensors by the names, and in the shapes, that they have in the model `hf`.

    Of tensors that are converted together one group is held at a time; what the model does not take
    keeps its name.
    """

    def __init__(self, hf: Any, folder: FolderTensors) -> None:
        self._folder = folder
        self._conversion = Conversion(hf, folder.shapes)
        self.unused = self._conversion.unused
        self._group_of: dict[str, str] = {}
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self.shapes = {name: folder.shapes[name] for name in self.unused}

        def on_meta(name: str) -> Tensor:
            return torch.empty(folder.shapes[name], device="meta")

        for first in self._conversion.groups:
            made = self._conversion.convert(first, on_meta)
            self.shapes |= {name: tuple(part.shape) for name, part in made.items()}
            self._group_of |= dict.fromkeys(made, first)

    def sources(self) -> Iterator[tuple[str, list[str], bool]]:
        """Of what the model takes: one tensor's name there, those in the folder, and whether they
        are converted."""
        for first, group in self._conversion.groups.items():
            yield first, [name for name, _ in group.sources], group.converter is not None

    def has(self, name: str) -> bool:
        """Whether the folder has what the tensor is made of."""
        return name in self.shapes

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows `offset:offset + length` along dim 0 (all of a 0-dim tensor)."""
        first = self._group_of[name]
        group = self._conversion.groups[first]
        if group.converter is None:
            return self._folder.read(group.sources[-1][0], offset, length)
        if self._held[0] != first:
            self._held = ("", {})
            self._held = (first, self._conversion.convert(first, self._whole))
        part = self._held[1][name]
        return part[offset : offset + length] if part.ndim else part

    def close(self) -> None:
        """Close the folder's reader."""
        self._held = ("", {})
        self._folder.close()

    def _whole(self, name: str) -> Tensor:
        shape = self._folder.shapes[name]
        return self._folder.read(name, 0, shape[0] if shape else 1)


class ExportLayout:
    """Names, cuts and dtypes of the model `hf` in a folder, as `save_pretrained` writes it.

    `source`: safetensors' dtypes ("BF16") by name of the folder that the model was made of; without
    any, what transformers writes of a model that was made from nothing. `dtype` None: each tensor
    that of the source, what it lacks that of most of its tensors, and of nothing at all its own.
    """

    def __init__(
        self, hf: Any, source: Mapping[str, str], dtype: torch.dtype | None = None
    ) -> None:
        self._hf = hf
        self._source = dict(source)
        self._dtype = dtype
        self._waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        if source:
            conversion = Conversion(hf, source)
            set_conversions(hf, conversion.used)
            for name in conversion.unused:  # a quantisation's scales: not of the weights' dtype
                del self._source[name]
        else:
            found = get_model_conversion_mapping(self._hf, add_legacy=False)
            set_conversions(hf, [one for one in found if not isinstance(one, PrefixChange)])
        self._groups, self._renamed = self._sorted(hf)

    def take(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The next tensor of the model, whole: what of the folder is complete with it, by its name
        and in its dtype."""
        if name in self._renamed:
            yield self._written(self._renamed[name], tensor)
            return
        key, partners = self._groups[name]
        waiting = self._waiting[key]
        waiting[name] = tensor
        if len(waiting) == len(partners):
            del self._waiting[key]
            for item in revert_weight_conversion(self._hf, waiting).items():
                yield self._written(*item)

    def check_complete(self) -> None:
        """Raise ValueError where tensors came without those that they are converted with."""
        for key, waiting in self._waiting.items():
            came = ", ".join(waiting)
            raise ValueError(f"{key} cannot be written: of what it is made of only {came} came")

    def _sorted(self, hf: Any) -> tuple[dict[str, tuple[str, list[str]]], dict[str, str]]:
        """By name: tensors that are converted together, and the new names of those that are not."""
        names = {name for name, _ in (*hf.named_parameters(), *hf.named_buffers())}
        saved = hf.state_dict(keep_vars=True).keys()
        reverse = [transform.reverse_transform() for transform in reversed(conversions_of(hf))]
        renamings, converters = _split(reverse)
        groups: dict[str, list[str]] = defaultdict(list)
        plain: list[str] = []
        for name in sorted(saved & names, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, reverse=True)
            (plain if pattern is None else groups[key]).append(name)
        # Renamings alone look at no tensor: in one call, as some of them go by what came before.
        found: dict[Any, Any] = revert_weight_conversion(self._hf, {name: name for name in plain})  # type: ignore[misc]
        members = {name: (key, group) for key, group in groups.items() for name in group}
        return members, {name: target for target, name in found.items()}

    def _written(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if not tensor.is_floating_point():
            return name, tensor
        wanted = self._dtype or self._source_dtype(name) or tensor.dtype
        cast = tensor.to(wanted)
        if wanted == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
            message = (
                f"{name} holds numbers that float16 cannot; set actor.model.export_dtype to "
                "bfloat16 or float32"
            )
            expected = f"at most {torch.finfo(wanted).max:g}"
            raise InvalidValue(message, tensor=name, expected=expected)
        return name, cast

    def _source_dtype(self, name: str) -> torch.dtype | None:
        prefix = f"{self._hf.base_model_prefix}."
        for known in (name, name.removeprefix(prefix), prefix + name):
            if self._source.get(known) in FLOAT_DTYPES:
                return FLOAT_DTYPES[self._source[known]]
        return self._usual

    @cached_property
    def _usual(self) -> torch.dtype | None:
        """The dtype of most tensors of the source; None where it has none that is trained in."""
        known = [code for code in self._source.values() if code in FLOAT_DTYPES]
        return FLOAT_DTYPES[max(sorted(set(known)), key=known.count)] if known else None


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(renamings, converters), each in their order."""
    found = list(transforms)
    return (
        [one for one in found if isinstance(one, WeightRenaming)],
        [one for one in found if isinstance(one, WeightConverter)],
    )
