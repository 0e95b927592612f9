"""Operations that only look: what each computes from a micro-batch, by result name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.batch import BatchReader, MicroBatch
from nexrl_worker.training.candidates import top_k
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.heads import RewardModel, ValueModel
from nexrl_worker.training.memory import NO_ROOM, give_back, is_out_of_memory
from nexrl_worker.training.parallelize import forget_kept_back, release
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


def answered(operation: str, root: Root, reader: BatchReader, rows: Sequence[int], k: int | None) -> dict[str, Tensor]:
    """The operation's results for these rows, on the CPU. Where memory runs out the only rank takes half at a time.

    Raises DoesNotFit where it runs out under a single row.
    """
    try:
        return {name: values.cpu() for name, values in QUERIES[operation](root, reader.read(rows), k).items()}
    except Exception as error:
        if not is_out_of_memory(error) or dist.get_world_size() > 1:
            raise
        forget_kept_back(root)
    # Out of the block, whose error keeps the tensors of the failed forward alive.
    release(root)
    give_back(reader.device)
    if len(rows) < 2:
        raise DoesNotFit(NO_ROOM, tensor="input_ids", row=next(iter(rows), None))
    middle = len(rows) // 2
    first, second = (answered(operation, root, reader, part, k) for part in (rows[:middle], rows[middle:]))
    return {name: torch.cat([first[name], second[name]]) for name in first}
