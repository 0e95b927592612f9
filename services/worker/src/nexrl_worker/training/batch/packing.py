"""Packing: the rows of a micro-batch as one stream without padding, whose rows never attend to one
another.

The families' attention modules get the stream's :class:`Segments` as a keyword that transformers
hands down to the attention function; a family that does not hand it down is found out by the probe
and runs without packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.torch_parts import compiled_forms
from nexrl_worker.training.transformers_parts import (
    attention_of,
    flex_attention,
    register_attention,
    text_config,
    use_attention,
)

ATTENTION = "nexrl_segments"
# What attention functions are told that changes their result and that is not done here.
_NOT_OFFERED = ("s_aux", "position_bias", "head_mask")
# One kernel for streams of every length: below 128 tokens torch would take that of decoding, which
# the probe would then test in place of the one that trains, and compile everything twice.
_FLEX_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
_WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "attention_window",
    "attention_window_size",
    "attention_chunk_size",
)  # fmt: skip
# with and without gradients, short streams and long ones, a reference of another shape: more than 8
_FLEX_FORMS = 64


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; a GPU takes it from pinned memory, so that nobody waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Segments:
    """`lengths` of the rows in a stream of T tokens; `windows` collects the sliding window of every
    layer that ran.

    Not a dataclass: FSDP, where it casts what a layer is given, would hand every layer a copy of
    its own.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self.windows: list[int | None] = []
        self._masks: dict[int | None, Any] = {}

    @cached_property
    def bounds(self) -> Tensor:
        """Where rows begin and end: int32 [n+1] on the device."""
        return send(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)

    # one compiled form of what makes the mask, whether gradients are asked for or not
    @torch.no_grad()
    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask: the same row, not later, and less than `window` tokens before."""
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            # On the CPU: to learn how many tokens there are, the device would have to be waited
            # for.
            rows = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
            row = send(rows, self.device)
            total = int(row.numel())
            # A tensor: a number, or none, would be compiled into kernels of its own.
            reach = torch.full((), total if window is None else window, device=self.device)

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                """Whether place `query` sees place `key` of the stream, 0-dim each."""
                return (row[query] == row[key]) & (query >= key) & (query - key < reach)

            self._masks[window] = create_block_mask(
                visible, None, None, total, total, device=self.device, _compile=True
            )
        return self._masks[window]


def use_segments(hf: nn.Module) -> None:
    """Switch the model's attention to `attend`; raises InvalidValue where the family cannot."""
    register_attention(ATTENTION, attend)
    use_attention(hf, ATTENTION)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths change with every micro-batch
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, as an attention function of transformers.

    Shapes: query [1,A,T,D], key and value [1,K,T,D] with A a multiple of K; the result is
    [1,T,A,D]. Raises InvalidValue where something is asked for that is not done here.
    """
    if segments is None or attention_mask is not None:
        raise InvalidValue("the family does not hand the rows of a packed stream to its attention")
    refused = [name for name in _NOT_OFFERED if others.get(name) is not None]
    if refused or not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise InvalidValue(
            "the family's attention is not plain causal attention: "
            f"{', '.join(refused) or 'two ways'}"
        )
    segments.windows.append(sliding_window)
    how = _How(scaling, sliding_window, softcap)
    if query.device.type == "cuda":
        return _on_cuda(module, query, key, value, how, segments), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    lengths = list(segments.lengths)
    split = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    rows = zip(*split, strict=True)
    parts = [_row(one, keys, values, how).transpose(1, 2) for one, keys, values in rows]
    return torch.cat(parts, dim=1), None


class _How(NamedTuple):
    """Of attention: scores times `scaling` (None: by the width), a `window` of tokens, and
    `softcap` c, which bounds scores: c tanh(score / c)."""

    scaling: float | None
    window: int | None
    softcap: float | None


def _row(query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
    """Causal attention of one row, [1,A,L,D] each."""
    length, scaling, softcap = query.shape[2], how.scaling, how.softcap
    window = length if how.window is None else how.window
    if softcap is None and window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    if window < length:
        visible = visible.triu_(1 - window)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, float("-inf"))
    # float32 whatever the dtype, as transformers' own attention for these families does.
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _on_cuda(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: _How, segments: Segments
) -> Tensor:
    """FlashAttention's varlen kernel where it is installed and knows the dtype, else FlexAttention
    by blocks: query [1,A,T,D], key and value [1,K,T,D] give [1,T,A,D]."""
    flash = _flash_attention() if query.dtype in (torch.float16, torch.bfloat16) else None
    if flash is not None:
        longest = max(segments.lengths)
        stream = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attended: Tensor = flash(
            *stream, segments.bounds, segments.bounds, longest, longest,
            softmax_scale=how.scaling, causal=True, softcap=how.softcap or 0.0,
            window_size=(-1 if how.window is None else how.window - 1, 0),
        )  # fmt: skip
        return attended[None]
    # Beyond torch's own limit it would go on uncompiled, and hold every score of the stream at
    # once.
    with compiled_forms(_FLEX_FORMS):
        return flex_attention(
            module, query, key, value, attention_mask=segments.block_mask(how.window),
            scaling=how.scaling, softcap=how.softcap, kernel_options=dict(_FLEX_OPTIONS),
        )  # fmt: skip


def _flash_attention() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    return flash_attn_varlen_func


def unlike_configured(hf: nn.Module, segments: Segments) -> str | None:
    """Why the attention that ran is not the configured one, by the windows of the layers."""
    if attention_of(hf) != ATTENTION or not segments.windows:
        return "the family's attention cannot be exchanged"
    config = text_config(hf)
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the family attends in chunks"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    expected = len(segments.windows)
    if kinds is not None:
        expected = sum(kind == "sliding_attention" for kind in kinds)
    told = sum(size is not None and size == window for size in segments.windows)
    if window is not None and told != expected:
        return f"{expected} layers have a sliding window and {told} tell their attention"
    others = [name for name in _WINDOWS[1:] if isinstance(getattr(config, name, None), int)]
    if others and not any(getattr(config, name) in segments.windows for name in others):
        return f"no layer tells its attention of the {others[0]}"
    return None


@contextmanager
def narrowed_windows(hf: nn.Module, size: int) -> Iterator[None]:
    """Windows of `size` tokens inside the block, wherever larger ones are configured."""
    configs = (part.config for part in hf.modules() if hasattr(part, "config"))
    holders = [hf, *hf.modules(), *configs]
    before: list[tuple[dict[str, Any], str, int]] = []
    try:
        for values in map(vars, holders):
            for name in _WINDOWS:
                configured = values.get(name)
                if isinstance(configured, int) and configured > size:
                    before.append((values, name, configured))
                    values[name] = size
        yield
    finally:
        for values, name, configured in before:
            values[name] = configured
