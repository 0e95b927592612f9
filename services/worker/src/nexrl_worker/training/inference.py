"""Operations that only look: what each computes from a micro-batch, by result name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import BatchReader, MicroBatch
from nexrl_worker.training.batch.plan import Micro, halves
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.fsdp2 import attempt, drop
from nexrl_worker.training.model.candidates import top_k
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import RewardModel, ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.observe.memory import NO_ROOM, lone_row
from nexrl_worker.training.trainer import Parts, Result

Query = Callable[[ModelWrapper, MicroBatch, int | None], dict[str, Tensor]]


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
QUERIES: dict[str, Query] = {
    "compute_log_prob": _log_probs,
    "compute_ref_log_prob": _reference,
    "compute_values": _values,
    "compute_rewards": _rewards,
}


@torch.no_grad()
def answered(
    operation: str, model: ModelWrapper, reader: BatchReader, micros: Sequence[Micro], k: int | None
) -> Result:
    """The operation's answers for the rows of this rank's micro-batches, as many as any rank has.
    Collective.

    Where memory runs out on a rank, it takes its rows from there on once more, half as many at a
    time, and the others go with it; `memory/retries` says how often. Raises DoesNotFit on all ranks
    where it runs out under a single row.
    """
    answers: dict[str, Parts] = {}

    def act(rows: Sequence[int]) -> dict[str, Tensor]:
        return {
            name: values.cpu()
            for name, values in QUERIES[operation](model, reader.read(rows), k).items()
        }

    retries = 0
    while micros:
        left: list[Micro] = []
        failed: Micro | None = None
        for number, indices in enumerate(micros):
            rows = indices if failed is None else ()
            found, short = attempt([model], reader.device, act, rows)
            if short and failed is None:
                failed, left = rows, halves(micros[number:])
            if found is None:
                break
            for name, values in found.items():
                parts = answers.setdefault(
                    name, []
                )  # for a dummy too: all ranks answer with the same names
                parts += [(list(rows), values)] if rows and not short else []
        most = torch.tensor([len(left), failed is not None], device=reader.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        length, again = most.tolist()
        if again:
            row = lone_row(failed, reader.device)
            drop([model])
            if row is not None:
                raise DoesNotFit(NO_ROOM, tensor="input_ids", row=row)
            retries += 1
        micros = [*left, *[()] * (length - len(left))]
    return Result({"memory/retries": retries} if retries else {}, answers)
