"""The read-only operations: what each computes from a micro-batch, by result name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import BatchReader, MicroBatch
from nexrl_worker.training.batch.plan import Micro, halves
from nexrl_worker.training.micro_batch_loop import Parts, drop, run_micro_batches
from nexrl_worker.training.model.policy import PolicyModel, top_k
from nexrl_worker.training.model.value_head import RewardModel, ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.trainer import Result

Inference = Callable[[ModelWrapper, MicroBatch, int | None], dict[str, Tensor]]


def _log_probs(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    policy = cast(PolicyModel, model)
    if k is None:
        return {"old_log_probs": policy.score(micro, entropy=False, all_labels=True)[0].float()}
    labels, ids, values = top_k(policy, micro, k)
    return {
        "old_log_probs": labels.float(),
        "teacher_topk_ids": ids,
        "teacher_topk_log_probs": values.float(),
    }


def _reference(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"ref_log_prob": _log_probs(model, micro, None)["old_log_probs"]}


def _values(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"values": cast(ValueModel, model).values(micro).float()}


def _rewards(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"rewards": cast(RewardModel, model).rewards(micro).float()}


# Results are [n,R] ([n,R,K] of the top k, [n] of rewards); 0 where a token is not attended.
INFERENCE: dict[str, Inference] = {
    "compute_log_prob": _log_probs,
    "compute_ref_log_prob": _reference,
    "compute_values": _values,
    "compute_rewards": _rewards,
}


@torch.no_grad()
def infer(
    operation: str, model: ModelWrapper, reader: BatchReader, micros: Sequence[Micro], k: int | None
) -> Result:
    """The operation's answers for the rows of this rank's micro-batches, as many as any rank has.
    Collective.

    Where memory runs out on a rank, it takes its rows from there on once more, half as many at a
    time, and the others go with it; `memory/retries` says how often. Raises DoesNotFit on all ranks
    where it runs out under a single row.
    """
    answers: dict[str, Parts] = {}

    def act(rows: Sequence[int], last: bool) -> dict[str, Tensor]:
        found = INFERENCE[operation](model, reader.read(rows), k)
        return {name: values.cpu() for name, values in found.items()}

    retries = 0
    while micros:
        ran = run_micro_batches([model], reader.device, micros, act)
        for name, parts in ran.answers.items():
            answers.setdefault(name, []).extend(parts)
        left = [] if ran.failed is None else halves(micros[ran.failed :])
        most = torch.tensor([len(left), ran.failed is not None], device=reader.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        length, again = most.tolist()
        if again:
            refusal = ran.does_not_fit(reader.device)
            drop([model])
            if refusal.row is not None:
                raise refusal
            retries += 1
        micros = [*left, *[()] * (length - len(left))]
    return Result({"memory/retries": retries} if retries else {}, answers)
