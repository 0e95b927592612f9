"""A plain single-process loop in float64, one row at a time, from `formulas` alone: what training
must come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tests.helpers.engines import MemoryRows
from tests.helpers.formulas import (
    Loss,
    aggregate,
    kept,
    over_candidates,
    policy,
    weighted_divergence,
)

Step = Callable[[list[int]], tuple[Tensor, dict[str, float]]]
LEVELS = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}


@dataclass
class Trained:
    """Of every optimizer step the gradients before clipping, their norm and the metrics; the
    weights at both ends.

    Rows without any scored token make no step: their metrics are None.
    """

    start: dict[str, Tensor]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, float] | None] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)


def train(
    model: nn.Module,
    rows: MemoryRows,
    loss: Loss,
    step: Step,
    orders: Sequence[list[int]],
    optim: dict[str, Any],
) -> Trained:
    """One AdamW step for each list of rows in `orders`, at a constant rate, on gradients clipped to
    `optim["clip"]`."""
    decayed = (
        get_decayed(model)
        if optim.get("no_decay")
        else {name for name, _ in model.named_parameters()}
    )
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if (n in decayed) == yes],
            "weight_decay": decay,
        }
        for yes, decay in ((True, optim["weight_decay"]), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=optim["lr"], eps=optim["eps"])
    made = Trained(_weights(model))
    for chosen in orders:
        if not any(used_columns(rows, row, loss) for row in chosen):
            made.metrics.append(None)
            continue
        adamw.zero_grad()
        total, metrics = step(chosen)
        total.backward()
        made.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"])
        made.metrics.append({**metrics, "grad_norm": float(norm), "loss": total.item()})
        adamw.step()
    made.end = _weights(model)
    return made


def get_decayed(model: nn.Module) -> set[str]:
    """What transformers' own trainer decays."""
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def scored_columns(rows: MemoryRows, row: int) -> list[int]:
    """Columns of the row's scored tokens, by the batch contract: attended, on the response, with a
    token before."""
    tensors = rows.tensors
    width = tensors["input_ids"].shape[1]
    attention = tensors["attention_mask"][row].bool()
    wanted = attention.clone()
    for name in ("loss_mask", "scoring_attention_mask"):
        if name in tensors:
            wanted &= tensors[name][row].bool()
    first = width - tensors["responses"].shape[1]
    return [c for c in range(first, width) if wanted[c] and attention[:c].any()]


def used_columns(rows: MemoryRows, row: int, loss: Loss) -> list[int]:
    """Those of the scored columns that no rollout correction drops."""
    columns = scored_columns(rows, row)
    if not loss.drops or loss.correction is None:
        return columns
    pair = [line_of(rows, name, row, columns) for name in ("old_log_probs", "rollout_log_probs")]
    return [
        column
        for column, stays in zip(columns, kept(*pair, **loss.correction), strict=True)
        if stays
    ]


def line_of(rows: MemoryRows, name: str, row: int, columns: list[int]) -> Tensor:
    """A tensor's values at these columns; it is [B,S], [B,R], [B,R,K] or [B]."""
    value = rows.tensors[name][row]
    width = rows.tensors["input_ids"].shape[1]
    if value.ndim == 0:
        return value.expand(len(columns))
    return value[[column - width + len(value) for column in columns]]


def outputs_at(model: nn.Module, rows: MemoryRows, row: int, columns: list[int]) -> Tensor:
    """The model's answers [T,...] at the tokens that predict these columns; the row alone, without
    its padding."""
    real = rows.tensors["attention_mask"][row].bool()
    alone = rows.tensors["input_ids"][row][real]
    places = [int(real[:column].sum()) - 1 for column in columns]
    answers: Tensor = model(input_ids=alone[None], use_cache=False).logits[0].double()
    return answers[places]


def temperature_of(rows: MemoryRows, row: int) -> float:
    """The row's own, else the batch's."""
    return float(
        rows.tensors["temperature"][row]
        if rows.has("temperature")
        else rows.metadata["temperature"]
    )


def policy_step(model: nn.Module, rows: MemoryRows, loss: Loss, names: Sequence[str]) -> Step:
    """`names` are the tensors that the loss may read."""

    def step(chosen: list[int]) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, list[Tensor]] = {"policy": [], "entropy": [], "kl": []}
        seen: dict[str, list[Tensor]] = {
            name: [] for name in ("ratio", "gain", "gap", "teacher", "mismatch")
        }
        for row in chosen:
            columns = used_columns(rows, row, loss)
            logs = torch.log_softmax(
                outputs_at(model, rows, row, columns) / temperature_of(rows, row), dim=-1
            )
            labels = rows.tensors["input_ids"][row][columns]
            lp = logs[range(len(columns)), labels]
            held = lp.detach()
            line = {name: line_of(rows, name, row, columns) for name in names}
            parts["policy"].append(_main(loss, logs, lp, held, line))
            parts["entropy"].append(-(torch.exp(logs) * logs).sum(dim=-1))
            if loss.kl:
                parts["kl"].append(weighted_divergence(loss, lp, held, line))
            _look(loss, held, line, seen)
            if "rollout_log_probs" in names:
                every = scored_columns(rows, row)
                old = (
                    line_of(rows, "old_log_probs", row, every) if "old_log_probs" in names else held
                )
                seen["mismatch"].append(line_of(rows, "rollout_log_probs", row, every) - old)
        total = aggregate(loss, parts["policy"]) - loss.entropy * aggregate(loss, parts["entropy"])
        metrics = {
            "pg_loss": aggregate(loss, parts["policy"]).item(),
            "entropy_loss": aggregate(loss, parts["entropy"]).item(),
        }
        if loss.kl:
            divergent = aggregate(loss, parts["kl"])
            total = total + loss.kl * divergent
            metrics["kl_loss"] = divergent.item()
        return total, {**metrics, **_counted(loss, parts["policy"], seen)}

    return step


def _main(loss: Loss, logs: Tensor, lp: Tensor, held: Tensor, line: dict[str, Tensor]) -> Tensor:
    if loss.name not in ("forward_kl", "reverse_kl"):
        return policy(loss, lp, held, line)
    assert loss.teacher is not None
    ids, given = line["teacher_topk_ids"], line["teacher_topk_log_probs"]
    return loss.teacher * over_candidates(logs, ids, given, loss.name == "forward_kl")


def _look(loss: Loss, held: Tensor, line: dict[str, Tensor], seen: dict[str, list[Tensor]]) -> None:
    old = line.get("old_log_probs", held)
    ratio = torch.exp(held - old)
    if loss.name == "gspo" and len(held):
        ratio = torch.exp((held - old).mean()).expand(len(held))
    gain = line.get("advantages", torch.zeros_like(held))
    if "teacher_log_probs" in line:
        seen["teacher"].append(held - line["teacher_log_probs"])
        gain = gain + (loss.teacher or 0.0) * (line["teacher_log_probs"] - held)
    seen["ratio"].append(ratio)
    seen["gain"].append(gain)
    seen["gap"].append(old - held)


def _counted(loss: Loss, lines: list[Tensor], seen: dict[str, list[Tensor]]) -> dict[str, float]:
    """Means over the tokens, and nearest-rank quantiles."""
    found = {
        "tokens": float(sum(len(line) for line in lines)),
        "rows": float(sum(len(line) > 0 for line in lines)),
    }
    if seen["teacher"]:
        found["teacher_kl"] = float(torch.cat(seen["teacher"]).mean())
    if loss.name in ("reinforce", "cross_entropy", "linear", "forward_kl", "reverse_kl"):
        return found
    ratio, gain = torch.cat(seen["ratio"]), torch.cat(seen["gain"])
    ordered = sorted(ratio.tolist())
    found |= {
        f"ratio_{name}": ordered[round(level * (len(ordered) - 1))]
        for name, level in LEVELS.items()
    }
    found["ratio_mean"] = float(ratio.mean())
    found["ratio_outside"] = sum(r < 0.9 or r > 1.1 for r in ordered) / len(ordered)
    found["ppo_kl"] = float(torch.cat(seen["gap"]).mean())
    if loss.name != "importance_sampling":
        low = ratio < (-1.0 if loss.low is None else 1 - loss.low)
        high = ratio > 1 + loss.high
        if loss.name != "cispo":
            low, high = low & (gain < 0), high & (gain > 0)
        found["pg_clipfrac_low"] = float(low.double().mean())
        found["pg_clipfrac_high"] = float(high.double().mean())
    if seen["mismatch"]:
        gap = torch.cat(seen["mismatch"])
        found["mismatch_kl"] = float(gap.mean())
        found["mismatch_k3"] = float((torch.exp(-gap) - 1 + gap).mean())
    return found


def value_step(model: nn.Module, rows: MemoryRows, loss: Loss, eps: float) -> Step:
    """0.5 max((v - ret)^2, (clip(v, old - eps, old + eps) - ret)^2); without `values` in the batch
    0.5 (v - ret)^2."""

    def step(chosen: list[int]) -> tuple[Tensor, dict[str, float]]:
        lines, errors, targets, found, clipped = [], [], [], [], 0
        for row in chosen:
            columns = scored_columns(rows, row)
            values = outputs_at(model, rows, row, columns)[:, 0]
            target = line_of(rows, "returns", row, columns)
            line = (values - target) ** 2
            if "values" in rows.tensors:
                old = line_of(rows, "values", row, columns)
                near = (torch.minimum(torch.maximum(values, old - eps), old + eps) - target) ** 2
                clipped += int((near > line).sum())
                line = torch.where(near > line, near, line)
            lines.append(0.5 * line)
            errors.append((target - values).detach())
            targets.append(target)
            found.append(values.detach())
        error, target, count = torch.cat(errors), torch.cat(targets), sum(map(len, lines))
        total = aggregate(loss, lines)
        spread = float(target.var(correction=0))
        explained = 1 - float(error.var(correction=0)) / spread if spread > 0 else 0.0
        return total, {
            "vf_loss": total.item(), "vf_clipfrac": clipped / count,
            "explained_variance": explained,
            "values_mean": float(torch.cat(found).mean()), "returns_mean": float(target.mean()),
            "tokens": float(count),
        }  # fmt: skip

    return step
