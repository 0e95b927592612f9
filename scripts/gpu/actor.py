"""What an engine is driven with where no service is: the actor's configuration and a batch in
memory."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nexrl_worker.training.batch.layout import RowsInMemory
from torch import Tensor

from gpu.shapes import Shape

SHORTEST = 0.2  # rows of 20 to 100 % of the longest in every micro-batch: 40 % of it is padding


def defaults(path: str) -> dict[str, Any]:
    """`actor` as docs/configuration.md documents it; a test compares it with the models behind that
    page."""
    return {
        "model": {
            "path": path, "enable_gradient_checkpointing": False, "use_remove_padding": False,
            "use_torch_compile": False, "lm_head_dtype": None, "export_dtype": None,
        },
        "optim": {
            "lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01,
            "lr_warmup_steps": 0,
            "lr_scheduler": "constant", "total_training_steps": None, "min_lr_ratio": 0.0,
            "no_decay": None,
        },
        "fsdp_config": {
            "model_dtype": "float32", "gradient_sync": "micro_batch",
            "mixed_precision": {"param_dtype": None, "reduce_dtype": None},
        },
        "rollout": {"n": 1, "temperature": 1.0}, "ref": {"model": {"path": None}},
        "policy_loss": "ppo", "loss_agg_mode": "token-mean", "loss_scale_factor": None,
        "rollout_correction": None,
        "clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": None,
        "entropy_coeff": 0.0, "use_kl_loss": False, "kl_loss_coef": 0.001,
        "kl_loss_type": "low_var_kl",
        "use_bias_correction_kl": False, "distillation_student": "current",
        "distillation_loss": "policy_gradient", "use_distillation_clipping": False,
        "distillation_cliprange": 0.2,
        "distillation_cliprange_low": None, "distillation_cliprange_high": None,
        "cliprange_value": 0.5,
        "ppo_mini_batch_size": None, "ppo_epochs": 1, "shuffle": False, "seed": 0,
        "ppo_micro_batch_size_per_gpu": None, "use_dynamic_bsz": False,
        "ppo_max_token_len_per_gpu": 16384,
        "grad_clip": 1.0,
    }  # fmt: skip


def actor(
    path: Path,
    *,
    packing: bool = False,
    recompute: bool = False,
    dtype: str | None = None,
    **top: Any,
) -> Any:
    """The defaults as attributes; `dtype` is that of the computation, `top` replaces keys of
    `actor` itself."""
    keys = defaults(str(path))
    keys["model"] |= {"use_remove_padding": packing, "enable_gradient_checkpointing": recompute}
    keys["fsdp_config"]["mixed_precision"]["param_dtype"] = dtype
    return _attributes({**keys, **top})


def _attributes(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{key: _attributes(item) for key, item in value.items()})


class Rows(RowsInMemory):
    """A batch in memory; `lengths` are the rows' real tokens."""

    def __init__(
        self, tensors: dict[str, Tensor], lengths: list[int], metadata: dict[str, Any]
    ) -> None:
        super().__init__(tensors, metadata)
        self.lengths = lengths


def make_rows(shape: Shape, *, padded: bool) -> Rows:
    """Right-padded rows in which every token but a row's first is scored; `padded`: 40 % of each
    micro-batch is padding.

    `old_log_probs` lie around those of a random model, so that some ratios are clipped, as in
    training.
    """
    random = torch.Generator().manual_seed(0)
    shares = (
        torch.linspace(SHORTEST, 1.0, shape.micro)
        if padded and shape.micro > 1
        else torch.ones(shape.micro)
    )
    lengths = (shares * shape.length).long().repeat(shape.rows // shape.micro)
    size = (shape.rows, shape.length)
    vocabulary = shape.config.vocab_size
    old = -torch.log(torch.tensor(float(vocabulary))) + 0.2 * torch.randn(size, generator=random)
    tensors = {
        "input_ids": torch.randint(0, vocabulary, size, generator=random),
        "attention_mask": (torch.arange(shape.length) < lengths[:, None]).long(),
        "advantages": torch.randn(size, generator=random),
        "old_log_probs": old,
    }
    return Rows(tensors, lengths.tolist(), {"temperature": 1.0})


def free(device: torch.device) -> None:
    """Give back what nobody refers to any more: a model and its hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
