"""Where other libraries differ: their formulas beside ours in float64, and the figures that
docs/training.md gives.

`theirs` are restated from the libraries' own text, on whole tensors; nothing of the worker is in
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Space

import pytest
import torch
from nexrl_worker.training.losses.aggregation import Aggregation, Correction
from nexrl_worker.training.losses.formulas import FUNCTIONS, Clip, kl_terms, select_tokens
from nexrl_worker.training.optim import Schedule, norms_and_biases
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from tests.helpers.engines import SMALL, MemoryRows, batch, save_model
from tests.helpers.plain_loop import get_decayed
from tests.helpers.single_rank import build, compute, update

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
ROWS = {
    item.partition(".** ")[0]: " ".join(item.partition("\n\n")[0].split())
    for item in PAGE.split("\n- **")
    if ".** " in item
}
FAMILIES = (
    "llama qwen2 qwen3 gpt2 gpt_neox opt bloom gemma2 gemma3_text cohere olmo2 phi stablelm "
    "mixtral qwen3_moe falcon"
)


def values(*rows: list[float]) -> Tensor:
    return torch.tensor(
        [row + [float("nan")] * (3 - len(row)) for row in rows], dtype=torch.float64
    )


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
LP = values([-1.0, -0.5, -2.0], [-1.5])
OLD = values([-1.2, -0.4, -1.5], [-1.6])
REF = values([-1.3, -0.9, -1.8], [-1.1])
SAMPLER = values([-1.25, -0.5, -2.6], [-1.55])
TEACHER = values([-0.8, -0.7, -1.0], [-1.9])
ADVANTAGES = values([1.0, 1.0, 1.0], [-0.5])
Found = tuple[float, Tensor]


def at(loss: Callable[[Tensor], Tensor]) -> Found:
    """Value and gradient."""
    leaf = LP.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad[MASK]


def off(mine: Found, other: Found) -> float:
    return float((mine[1] - other[1]).norm() / mine[1].norm())


def ours(
    lp: Tensor, name: str = "ppo", old: Tensor | None = OLD, gain: Tensor = ADVANTAGES,
    by: Tensor | float = 1.0,
    mask: Tensor = MASK,
) -> Tensor:  # fmt: skip
    aggregation = Aggregation("token-mean")
    loss = FUNCTIONS[name](select_tokens(lp, mask, old, gain), Clip()).loss * by
    return aggregation.numerator(loss, mask) / aggregation.divisor(float(aggregation.count(mask)))


def our_kl(lp: Tensor, old: Tensor | None) -> Tensor:
    kept, reference = (torch.where(MASK, value, 0.0) for value in (lp, REF))
    return kl_terms(kept, reference, "k3", None if old is None else torch.where(MASK, old, 0.0))[
        MASK
    ].mean()


def clipped(lp: Tensor, old: Tensor) -> Tensor:
    ratio = (lp - old).exp()
    return -torch.minimum(ADVANTAGES * ratio, ADVANTAGES * ratio.clamp(0.8, 1.2))


def says(row: str, *figures: str) -> None:
    """The table's row holds these figures."""
    for figure in figures:
        assert figure in ROWS[row], (row, figure)


def percent(share: float) -> str:
    return f"{100 * share:.0f} % off"


def test_the_kl_times_the_ratio() -> None:
    """TRL: (exp(ref - lp) - (ref - lp) - 1) * exp(lp - old)."""
    theirs = at(lambda lp: (((REF - lp).exp() - (REF - lp) - 1) * (lp - OLD).exp())[MASK].mean())
    plain, weighed = at(lambda lp: our_kl(lp, None)), at(lambda lp: our_kl(lp, OLD))
    assert off(weighed, theirs) < 1e-12 and weighed[0] == pytest.approx(theirs[0], rel=1e-12)
    says("KL times the ratio", percent(off(plain, theirs)))


def test_the_mean_of_micro_batch_means() -> None:
    """verl: the token mean of each row, then their mean; ours with advantages scaled by N / (M n)
    is the same."""
    theirs = at(
        lambda lp: torch.stack([clipped(lp, OLD)[row][MASK[row]].mean() for row in (0, 1)]).mean()
    )
    plain = at(ours)
    scaled = at(lambda lp: ours(lp, gain=ADVANTAGES * torch.tensor([[4 / (2 * 3)], [4 / (2 * 1)]])))
    assert off(scaled, theirs) < 1e-7 and scaled[0] == pytest.approx(theirs[0], rel=1e-7)
    says("mean of means", f"{theirs[0]:.3f}", f"{plain[0]:.3f}", percent(off(plain, theirs)))


def test_old_log_probs_of_a_single_mini_batch() -> None:
    """verl: old is lp itself; ours without the tensor is the same."""
    theirs = at(lambda lp: clipped(lp, lp.detach())[MASK].mean())
    plain, without = at(ours), at(lambda lp: ours(lp, old=None))
    assert off(without, theirs) < 1e-12 and without[0] == pytest.approx(theirs[0], rel=1e-12)
    says("one mini-batch", f"{theirs[0]:.3f}", f"{plain[0]:.3f}", percent(off(plain, theirs)))


def test_rejected_tokens_leave_the_denominator() -> None:
    """verl: the mean over the tokens that are not rejected."""
    correction = Correction("token_mask", 0.5, 2.0)
    by, kept = (pick(OLD, SAMPLER, MASK) for pick in (correction.weights, correction.kept))
    theirs = at(lambda lp: (clipped(lp, OLD) * (OLD - SAMPLER).exp())[kept].mean())
    plain, dropping = at(lambda lp: ours(lp, by=by)), at(lambda lp: ours(lp, by=by, mask=kept))
    assert int(kept.sum()) == 3 and off(dropping, theirs) < 1e-12
    says("rejected tokens", percent(off(plain, theirs)))


def test_the_samplers_form_of_distillation() -> None:
    """tinker: advantage -(sampled - teacher), loss -(exp(lp - sampled) advantage), here over N."""
    theirs = at(lambda lp: -((lp - OLD).exp() * -(OLD - TEACHER))[MASK].mean())
    plain = at(lambda lp: ours(lp, "importance_sampling", gain=TEACHER - lp.detach()))
    sampler = at(lambda lp: ours(lp, "importance_sampling", gain=TEACHER - OLD))
    assert off(sampler, theirs) < 1e-12
    says("on-policy distillation", percent(off(plain, theirs)))


def test_a_warm_up_is_one_step_ahead() -> None:
    """transformers' rate at step t + 1 is ours at t, all through; theirs starts at 0."""
    settings = {"lr": 0.5, "lr_warmup_steps": 4, "total_training_steps": 12, "min_lr_ratio": 0.0}
    schedule = Schedule(Space(**settings, lr_scheduler="constant"))
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler("constant_with_warmup", adamw, num_warmup_steps=4)
    rates = []
    for _ in range(8):
        rates.append(theirs.get_last_lr()[0])
        adamw.step()
        theirs.step()
    mine = [schedule.lr(step) for step in range(8)]
    assert (
        rates[0] == 0.0
        and mine[:7] == pytest.approx(rates[1:])
        and sum(mine) - sum(rates) == pytest.approx(0.5)
    )
    says("warm-up of n", "lr (t+1)/n", "lr in all")


@pytest.mark.parametrize("family", FAMILIES.split())
def test_what_weight_decay_spares_is_what_transformers_trainer_spares(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2))
    names = {name for name, _ in model.named_parameters()}
    assert norms_and_biases(model) == names - get_decayed(model) != set()


@pytest.mark.usefixtures("one_rank")
def test_spared_parameters_stay_where_no_gradient_moves_them(tmp_path: Path) -> None:
    """Decay shrinks weights by lr x weight_decay a step; a state saved without the setting goes on
    under it."""
    path = save_model(tmp_path / "model", tie_word_embeddings=True)
    optim = {"lr": 1e-2, "weight_decay": 0.1}
    first, second = (
        build(path, optim={**optim, "no_decay": rule}) for rule in (None, "norms and biases")
    )
    rows = batch()
    rows.tensors["advantages"] = torch.zeros_like(
        rows.tensors["advantages"]
    )  # what moves a weight now is decay alone
    before = {
        name: value.clone() for name, value in first.state.full_weights() if value is not None
    }
    for engine in (first, second):
        assert update(engine, rows)[0].metrics["step_applied"]
    spared = norms_and_biases(second._model.hf)
    for (name, decayed), (_, kept) in zip(
        first.state.full_weights(), second.state.full_weights(), strict=True
    ):
        assert decayed is not None and kept is not None
        assert torch.allclose(decayed, before[name] * (1 - 1e-3), atol=1e-12)
        assert torch.allclose(kept, before[name] * (1 if name in spared else 1 - 1e-3), atol=1e-12)
    saved = {part.name: part.local_tensor.clone() for part in first.state.shards()}
    second.state.load_shards(
        Space(read=lambda name, offset, length: saved[name][offset : offset + length])
    )
    second.state.load_scalars(first.state.scalars())
    assert update(second, rows)[0].metrics["step_applied"]
    for name, value in second.state.full_weights():
        assert value is not None
        assert torch.allclose(value, saved[name] * (1 if name in spared else 1 - 1e-3), atol=1e-12)
    says("weight decay", f"{100 * (1 - (1 - 1e-3 * 0.1) ** 1000):.1f} %")


@pytest.mark.usefixtures("one_rank")
def test_a_hole_is_a_token_that_is_not_there(tmp_path: Path) -> None:
    """Ours is the row without it; transformers, given verl's positions, differs at the token after
    the hole alone."""
    path = save_model(tmp_path / "model")
    ids = torch.randint(
        0, int(str(SMALL["vocab_size"])), (1, 12), generator=torch.Generator().manual_seed(2)
    )
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    rows = MemoryRows({"input_ids": ids, "attention_mask": mask}, temperature=1.0)
    found = compute(build(path), "compute_log_prob", rows)["old_log_probs"][0].double()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)

    def scores(
        tokens: Tensor, visible: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            logits = model(
                input_ids=tokens, attention_mask=visible, position_ids=positions, use_cache=False
            ).logits
        return torch.log_softmax(logits[0], -1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]

    there = [
        column for column in range(11) if column != 4
    ]  # of the labels: column 5 of the row is the hole
    assert torch.allclose(found[there], scores(ids[:, mask[0].bool()]), atol=1e-6)
    verl, plain = scores(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)), scores(ids, mask)
    others = [column for column in there if column != 5]
    assert torch.allclose(found[others], verl[others], atol=1e-6)
    assert (found[5] - verl[5]).abs() > 1e-2 and (found[others] - plain[others])[
        5:
    ].abs().mean() > 1e-2
    shown = MemoryRows({"input_ids": ids, "attention_mask": torch.ones_like(mask)}, temperature=1.0)
    assert torch.allclose(
        compute(build(path), "compute_log_prob", shown)["old_log_probs"][0].double(),
        scores(ids),
        atol=1e-6,
    )
