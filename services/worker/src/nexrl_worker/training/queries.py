"""Operations that only look: what each computes from a micro-batch, by result name."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.candidates import top_k
from nexrl_worker.training.heads import RewardModel, ValueModel
from nexrl_worker.training.roots import Root
from nexrl_worker.training.scorer import Scorer

Query = Callable[[Root, MicroBatch, int | None], dict[str, Tensor]]


def _log_probs(root: Root, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    scorer = cast(Scorer, root)
    if k is None:
        return {"old_log_probs": scorer.score(micro, entropy=False, all_labels=True)[0].float()}
    labels, ids, values = top_k(scorer, micro, k)
    return {"old_log_probs": labels.float(), "teacher_topk_ids": ids, "teacher_topk_log_probs": values.float()}


def _reference(root: Root, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"ref_log_prob": _log_probs(root, micro, None)["old_log_probs"]}


def _values(root: Root, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"values": cast(ValueModel, root).values(micro).float()}


def _rewards(root: Root, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"rewards": cast(RewardModel, root).rewards(micro).float()}


# Results are [n,R] ([n,R,K] of the top k, [n] of rewards); 0 where a token is not attended.
QUERIES: dict[str, Query] = {
    "compute_log_prob": _log_probs,
    "compute_ref_log_prob": _reference,
    "compute_values": _values,
    "compute_rewards": _rewards,
}
