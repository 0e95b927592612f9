"""Where the weights of a model folder come from, and the account of them: nothing is left over on
either side.

Each tensor in the files is a parameter's or buffer's, or one that transformers leaves out too; each
parameter has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.conversion import ConvertingReader, FolderTensors
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.quantised import NO_WEIGHTS, Dequantised, quantisation
from nexrl_worker.training.model.roles import Role
from nexrl_worker.training.model.value_head import head_of
from nexrl_worker.training.model.weights import FLOAT_DTYPES, FolderReader
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.transformers_parts import (
    class_of,
    ignored_if_missing,
    ignored_if_unexpected,
    tied_keys,
    tied_keys_of,
)

_OTHER_PARTS = (
    r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|embed_vision|embed_audio|mm_\w+)\."
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
_ROWS = 8192


def folder_tensors(path: str | Path) -> Dequantised:
    """The folder's tensors, de-quantised; raises InvalidValue where that is not known."""
    return Dequantised(FolderReader(Path(path)), quantisation(Path(path)))


def has_own_head(hf: Any, folder: FolderTensors) -> bool:
    """Whether the folder's output head is another than the embedding that its configuration ties it
    to.

    Transformers does not tie them then. Raises InvalidValue where only some of several tied tensors
    differ.
    """
    reader = _converted(hf, folder)
    tied = [pair for pair in tied_keys(hf).items() if pair[0] != pair[1]]
    apart = [
        (one, other)
        for one, other in tied
        if reader.has(one) and reader.has(other) and _differ(reader, one, other)
    ]
    if apart and len(apart) < len(tied):
        one, other = apart[0]
        message = f"{one} and {other} are one tensor by the configuration, but the files have two"
        raise InvalidValue(message, tensor=one)
    return bool(apart)


def _differ(reader: ConvertingReader, one: str, other: str) -> bool:
    shape = reader.shapes[one]
    if shape != reader.shapes[other]:
        return True
    rows = shape[0] if shape else 1
    pieces = ((start, min(_ROWS, rows - start)) for start in range(0, rows, _ROWS))
    return any(not torch.equal(reader.read(one, *at), reader.read(other, *at)) for at in pieces)


def untie(config: PretrainedConfig) -> None:
    """Let head and embedding be two."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", None):
            part.tie_word_embeddings = False


class Account:
    """What a folder has for the `model`: a reader of the model's tensors by its names.

    Raises InvalidValue naming the first tensor that no parameter takes, the first parameter without
    one, the first of another shape or of a dtype that is no weight's. What `role` makes anew is
    zero where the folder lacks it.
    """

    def __init__(self, model: ModelWrapper, folder: FolderTensors, role: Role, fresh: bool) -> None:
        hf = model.hf
        self._reader = _converted(hf, folder)
        held = list(model.exported())
        needed = {part.name: part.global_shape for part in held}
        buffers = {part.name: part.local_tensor for part in held if part.replicated}
        ties = [pair for tie in tied_keys(hf).items() for pair in (tie, tie[::-1])]
        self._same = {
            one: other
            for one, other in ties
            if one in needed and not self._reader.has(one) and self._reader.has(other)
        }
        head = _head_names(hf) if fresh else set()
        absent = {name for name in needed if not self._reader.has(name) and name not in self._same}
        kept = _matching(ignored_if_missing(hf), absent & buffers.keys())
        self._zeros = {name: needed[name] for name in absent & head}
        self._kept = {name: buffers[name] for name in kept}
        _check_left(hf, folder, self._reader.unused, role)
        _check_missing(sorted(absent - head - kept), needed)
        for name, shape in needed.items():
            found = self._reader.shapes.get(self._same.get(name, name), shape)
            if found != shape:
                have, expected = str(list(found)), str(list(shape))
                message = f"{name} has shape {have}, the model needs {expected}"
                raise InvalidValue(message, tensor=name, expected=expected, actual=have)
        state = hf.state_dict(keep_vars=True).items()
        self._check_sources(folder, {name for name, one in state if one.is_floating_point()})
        self.shapes = {name: shape for name, shape in needed.items() if name not in self._zeros}

    def has(self, name: str) -> bool:
        """Whether the folder has the model's tensor."""
        return name in self.shapes

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows `offset:offset + length` along dim 0 (all of a 0-dim tensor)."""
        if name in self._zeros:
            return torch.zeros(length, *self._zeros[name][1:])
        if name in self._kept:
            return self._kept[name]
        return self._reader.read(self._same.get(name, name), offset, length)

    def close(self) -> None:
        """Close the folder's reader."""
        self._reader.close()

    def _check_sources(self, folder: FolderTensors, weights: set[str]) -> None:
        for first, names, converted in self._reader.sources():
            for name in names:
                code = folder.dtypes[name]
                if first in weights and code not in FLOAT_DTYPES:
                    message = (
                        f"{name} holds numbers of dtype {code} without a scale that is known "
                        "here: no weights to train"
                    )
                    expected = ", ".join(FLOAT_DTYPES)
                    raise InvalidValue(message, tensor=name, expected=expected, actual=code)
            if len(names) > 1 and not converted:
                message = f"the files have both {names[0]} and {names[1]} for one tensor, {first}"
                raise InvalidValue(message, tensor=names[1])


def weights_of(path: str, model: ModelWrapper, role: Role) -> Account:
    """Slices of the folder for the model, each accounted for."""
    return Account(model, folder_tensors(path), role, fresh=role.fresh_head)


def _converted(hf: Any, folder: FolderTensors) -> ConvertingReader:
    try:
        return ConvertingReader(hf, folder)
    except (RuntimeError, KeyError, IndexError) as error:  # shapes or tensors that do not fit
        raise InvalidValue(f"the weights are not those of the configuration: {error}") from error


def _head_names(hf: nn.Module) -> set[str]:
    head = head_of(hf)
    own = {id(param) for param in head.parameters()}
    return {name for name, param in hf.named_parameters() if id(param) in own}


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    known = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if any(pattern.search(name) for pattern in known)}


def _check_left(hf: Any, folder: FolderTensors, unused: Mapping[str, str], role: Role) -> None:
    """Raise InvalidValue where tensors are left that transformers has no reason to leave."""
    quantised = isinstance(folder, Dequantised) and folder.method is not None
    reasons = _left_out(hf, role, quantised)
    left = [
        name
        for name, target in unused.items()
        if not _matching(reasons, (name, target)) and not _is_mask(name, folder.shapes[name])
    ]
    if not left:
        return
    layers = sorted({int(found[1]) for name in left if (found := _LAYER.search(name))})
    count = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and layers and layers[0] >= count:
        message = (
            f"the files have layers up to {layers[-1]}, but num_hidden_layers is {count}: "
            f"{left[0]} would not be used"
        )
    else:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        message = (
            f"{left[0]}{more} would not be used: the model, a {type(hf).__name__}, has nothing of "
            "that name"
        )
    raise InvalidValue(message, tensor=left[0])


def _left_out(hf: Any, role: Role, quantised: bool) -> set[str]:
    """Patterns of what is rightly left: by transformers' own lists, and what has no part in the
    model's answer."""
    config, text = hf.config, hf.config.get_text_config()
    patterns = {*ignored_if_unexpected(hf), r"(^|\.)(inv_freq|position_ids|masked_bias)$"}
    patterns.add(r"^(\w+\.)*mtp\w*\.")
    saved = hf.state_dict(keep_vars=True).keys()
    unsaved = (name for name, _ in hf.named_buffers() if name not in saved)
    patterns |= {rf"(^|\.){re.escape(name)}$" for name in unsaved}
    # Layers beyond the last predict further tokens.
    count = getattr(text, "num_hidden_layers", 0)
    more = getattr(text, "num_nextn_predict_layers", None) or 0
    patterns |= {rf"(^|\.)layers\.{count + number}\." for number in range(more)}
    if not any(name.endswith("_config") and name != "text_config" for name in config.sub_configs):
        patterns.add(_OTHER_PARTS)  # of a folder whose text part is trained
    if not issubclass(role.wrapper, PolicyModel):  # made of a language model: its output head
        tied = tied_keys_of(class_of(AutoModelForCausalLM, config))
        heads = {"lm_head", "embed_out", "cls"} | {key.rpartition(".")[0] for key in tied}
        patterns |= {rf"^{head}\." for head in heads if head}
    if quantised:
        patterns.add(NO_WEIGHTS)
    return patterns


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """A causal mask, which older families saved: [1, 1, n, n]."""
    named = name.endswith((".attn.bias", ".attention.bias"))
    return named and len(shape) == 4 and shape[:2] == (1, 1)


def _check_missing(absent: list[str], needed: Mapping[str, tuple[int, ...]]) -> None:
    if absent:
        more = f" and {len(absent) - 1} more of {len(needed)} tensors" if len(absent) > 1 else ""
        message = f"the files lack {absent[0]}{more}, which the model needs"
        raise InvalidValue(message, tensor=absent[0])
