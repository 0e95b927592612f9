"""The loop that one writes without a service: transformers' own logits, log-softmax, PPO-clip,
AdamW; shares no code with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gpu.actor import Rows

LEARNING_RATE, CLIP, GRAD_CLIP, WEIGHT_DECAY = 1e-6, 0.2, 1.0, 0.01


class PlainLoop:
    """A model in `dtype`; where that is bfloat16, master weights, their gradients and AdamW's
    moments are float32."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        micro: int,
        dtype: torch.dtype,
        *,
        recompute: bool = False,
    ) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        self.model = loaded.to(device)
        if recompute:
            _recompute(self.model)
            # transformers recomputes in this mode alone; the models have no dropout
            self.model.train()
        self._device = device
        self._micro = micro
        self._params: list[nn.Parameter] = list(self.model.parameters())
        self._masters = self._params
        if dtype == torch.bfloat16:
            self._masters = [nn.Parameter(param.detach().float()) for param in self._params]
            for param, master in zip(self._params, self._masters, strict=True):
                _hand_gradients_to(param, master)
        self._adamw = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def log_probs(self, rows: Rows, at: slice) -> Tensor:
        """Log-probabilities [n,S-1] of every next token of these rows, padding included, at least
        float32."""
        ids = rows.tensors["input_ids"][at].to(self._device)
        attention = rows.tensors["attention_mask"][at].to(self._device)
        logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        del logits
        return torch.log_softmax(wide, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)

    def backward(self, rows: Rows) -> None:
        """Gradients of the PPO-clip loss, the mean over all real tokens of the batch, micro-batch
        by micro-batch."""
        real = rows.tensors["attention_mask"][:, 1:]
        for first in range(0, rows.size, self._micro):
            at = slice(first, first + self._micro)
            log_probs = self.log_probs(rows, at)
            gain, old = (
                rows.tensors[name][at, 1:].to(log_probs) for name in ("advantages", "old_log_probs")
            )
            ratio = torch.exp(log_probs - old)
            kept = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
            loss = -(kept * real[at].to(log_probs)).sum() / int(real.sum())
            loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rows: Rows) -> float:
        """One optimizer step; the gradient's norm before clipping."""
        self.backward(rows)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, GRAD_CLIP)
        self._adamw.step()
        self._adamw.zero_grad()
        if self._masters is not self._params:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self._masters)
        return float(norm)


def _recompute(model: Any) -> None:
    """Layers again in the backward; transformers 5.23 has a new name for it."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def _hand_gradients_to(param: nn.Parameter, master: nn.Parameter) -> None:
    """Micro-batches add up in float32, and the bfloat16 gradient is gone as soon as it is whole."""

    def hand_over(param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad.add_(param.grad)
        param.grad = None

    param.register_post_accumulate_grad_hook(hand_over)
