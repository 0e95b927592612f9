"""Distillation and client-side losses through the service: teachers move the student as the
formulas say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_client import (
    HTTPTrainServiceClient,
    InvalidConfig,
    InvalidTensor,
    InvalidValue,
    StatusError,
)
from transformers import AutoModelForCausalLM

from tests.helpers.service import VOCABULARY, StartGroup, fingerprint, make_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def pupil(start_group: StartGroup) -> Iterator[HTTPTrainServiceClient]:
    """Two ranks; every test starts from the weights saved here."""
    client = start_group("pupil", world_size=2)
    client.save_checkpoint("pupil/start", remove_previous_ckpt=False)
    yield client
    client.destroy()


@pytest.fixture(autouse=True)
def _start_again(pupil: HTTPTrainServiceClient) -> None:
    pupil.load_checkpoint("pupil/start")


def _scored(batch: Batch) -> torch.Tensor:
    tensors = batch["tensors"]
    return (tensors["attention_mask"] * tensors["loss_mask"])[:, -6:].bool()


def _distribution(client: HTTPTrainServiceClient, batch: Batch) -> torch.Tensor:
    """Log-probabilities [B,R,V] by way of top_k = V."""
    best = client.compute_log_prob(batch, top_k=VOCABULARY)["batch"]
    values = best["teacher_topk_log_probs"]
    return torch.empty_like(values).scatter(-1, best["teacher_topk_ids"], values)


def _kl(first: torch.Tensor, second: torch.Tensor, batch: Batch) -> float:
    return float((first.exp() * (first - second)).sum(-1)[_scored(batch)].mean())


def _top(teacher: HTTPTrainServiceClient, batch: Batch, k: int) -> Batch:
    found = teacher.compute_log_prob(batch, top_k=k)["batch"]
    tensors = {name: found[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs")}
    return {"tensors": {**batch["tensors"], **tensors}, "metadata": batch["metadata"]}


def test_top_k_are_the_likeliest_tokens_with_transformers_own_numbers(
    teacher: HTTPTrainServiceClient, other_model: Path
) -> None:
    """Also at a temperature other than 1, where the numbers are those of the divided logits."""
    batch = make_batch(rows=3)
    tensors, batch["metadata"]["temperature"] = batch["tensors"], 0.7
    mask = tensors["attention_mask"]
    model = AutoModelForCausalLM.from_pretrained(other_model)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tensors["input_ids"], attention_mask=mask, position_ids=positions).logits
    theirs = torch.log_softmax(logits[:, 3:-1] / 0.7, -1).topk(5, dim=-1)

    ours = teacher.compute_log_prob(batch, top_k=5)["batch"]

    assert ours["teacher_topk_ids"].dtype == torch.int64
    assert ours["teacher_topk_ids"].shape == ours["teacher_topk_log_probs"].shape == (3, 6, 5)
    attended = mask[:, -6:].bool()
    assert torch.equal(ours["teacher_topk_ids"][attended], theirs.indices[attended])
    torch.testing.assert_close(
        ours["teacher_topk_log_probs"][attended], theirs.values[attended], atol=1e-5, rtol=0
    )
    assert ours["old_log_probs"].shape == (3, 6)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_at_the_whole_vocabulary_the_loss_is_the_exact_kl_and_it_falls(
    pupil: HTTPTrainServiceClient, teacher: HTTPTrainServiceClient, loss: str
) -> None:
    batch = make_batch()
    student, wanted = (_distribution(client, batch) for client in (pupil, teacher))
    exact = _kl(wanted, student, batch) if loss == "forward_kl" else _kl(student, wanted, batch)
    request = _top(teacher, batch, VOCABULARY)

    metrics = [
        pupil.update_actor_with_distillation(request, distillation_loss=loss)["metrics"]
        for _ in range(8)
    ]

    assert metrics[0]["actor/teacher_kl"] == pytest.approx(exact, rel=1e-4)
    assert metrics[0]["actor/loss"] == pytest.approx(exact, rel=1e-4)
    assert metrics[-1]["actor/teacher_kl"] < 0.9 * exact


def test_a_few_tokens_and_the_rest_give_less_than_the_whole_kl(
    pupil: HTTPTrainServiceClient, teacher: HTTPTrainServiceClient
) -> None:
    """The bucketed KL grows with K, and is never more than the exact one."""
    batch = make_batch()
    seen = []
    for k in (1, 8, VOCABULARY):
        pupil.load_checkpoint("pupil/start")
        request = _top(teacher, batch, k)
        result = pupil.update_actor_with_distillation(request, distillation_loss="forward_kl")
        seen.append(result["metrics"]["actor/teacher_kl"])

    assert 0 < seen[0] < seen[1] < seen[2]


def test_the_policy_gradient_moves_the_student_towards_its_teacher(
    pupil: HTTPTrainServiceClient, teacher: HTTPTrainServiceClient
) -> None:
    """teacher_kl is the mean of student minus teacher over the scored tokens; tokens that the
    teacher likes gain."""
    batch = make_batch()
    scored = _scored(batch)
    before = pupil.compute_log_prob(batch)["batch"]["old_log_probs"]
    opinion = teacher.compute_log_prob(batch)["batch"]["old_log_probs"]
    request = {
        "tensors": {**batch["tensors"], "teacher_log_probs": opinion},
        "metadata": batch["metadata"],
    }
    del request["tensors"]["advantages"]

    metrics = pupil.update_actor_with_distillation(request)["metrics"]

    after = pupil.compute_log_prob(batch)["batch"]["old_log_probs"]
    gap = (opinion - before)[scored]
    assert metrics["actor/teacher_kl"] == pytest.approx(float(-gap.mean()), abs=1e-5)
    assert float((gap * (after - before)[scored]).sum()) > 0


def test_two_teachers_give_two_gradients(
    pupil: HTTPTrainServiceClient, teacher: HTTPTrainServiceClient
) -> None:
    """And coefficient 0 gives none of either: then the update is that of the advantages alone."""
    batch = make_batch()
    opinion = teacher.compute_log_prob(batch)["batch"]["old_log_probs"]
    own = pupil.compute_log_prob(batch)["batch"]["old_log_probs"]

    def after(teacher_log_probs: torch.Tensor, coefficient: float) -> str:
        pupil.load_checkpoint("pupil/start")
        tensors = {**batch["tensors"], "old_log_probs": own, "teacher_log_probs": teacher_log_probs}
        request = {"tensors": tensors, "metadata": batch["metadata"]}
        result = pupil.update_actor_with_distillation(request, distillation_coeff=coefficient)
        return str(result["meta_info"]["fingerprint"])

    opposite = own - (opinion - own)

    assert len({after(opinion, 1.0), after(opposite, 1.0), after(opinion, 0.0)}) == 3
    assert after(opinion, 0.0) == after(opposite, 0.0)


def test_a_loss_made_by_the_client_moves_the_weights_as_ours_does(
    pupil: HTTPTrainServiceClient,
) -> None:
    """linear with w = dL/dlp of REINFORCE, by token mean, is REINFORCE; the log-probabilities come
    back in row order."""
    batch = make_batch()
    scored = _scored(batch)
    tensors, before = batch["tensors"], pupil.compute_log_prob(batch)["batch"]["old_log_probs"]
    weights = torch.where(scored, -tensors["advantages"][:, None] / scored.sum(), 0.0)

    ours = pupil.forward_backward(batch, loss="reinforce")
    ours |= pupil.optim_step()
    reinforced = pupil.compute_log_prob(batch)["batch"]["old_log_probs"]
    pupil.load_checkpoint("pupil/start")
    outside = pupil.forward_backward(
        {"tensors": {**tensors, "loss_weights": weights}}, loss="linear"
    )
    norm = pupil.optim_step()["metrics"]["actor/grad_norm"]
    linear = pupil.compute_log_prob(batch)["batch"]["old_log_probs"]

    torch.testing.assert_close(
        outside["batch"]["log_probs"][scored], before[scored], atol=1e-6, rtol=0
    )
    assert outside["batch"]["log_probs"].shape == (5, 6)
    assert norm == pytest.approx(ours["metrics"]["actor/grad_norm"], rel=1e-4)
    torch.testing.assert_close(linear, reinforced, atol=2e-5, rtol=0)
    assert not torch.equal(linear, before)


def _spoiled(tensors: dict[str, torch.Tensor], name: str, value: Any) -> dict[str, torch.Tensor]:
    """`value` replaces the tensor, or is (place, number) poked into it; None takes it away."""
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    if value is None:
        return others
    if isinstance(value, tuple):
        poked = tensors[name].clone()
        poked[value[0]] = value[1]
        value = poked
    return {**others, name: value}


_IDS, _LOG_PROBS = "teacher_topk_ids", "teacher_topk_log_probs"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (_IDS, ((2, 1, 0), VOCABULARY), InvalidValue),
        (_IDS, ((2, 1, 0), -1), InvalidValue),
        (_IDS, torch.zeros(5, 6, 4, dtype=torch.int64), InvalidValue),
        (_IDS, torch.zeros(5, 6, 4), InvalidTensor),
        (_IDS, torch.zeros(5, 6, dtype=torch.int64), InvalidTensor),
        (_IDS, None, InvalidTensor),
        (_LOG_PROBS, torch.zeros(5, 6, 3), InvalidTensor),
        (_LOG_PROBS, torch.zeros(5, 10, 4), InvalidTensor),
        (_LOG_PROBS, torch.zeros(5, 6, 4), InvalidValue),
        (_LOG_PROBS, ((4, 2, 3), torch.nan), InvalidValue),
        (_LOG_PROBS, None, InvalidTensor),
    ],
)
def test_a_teachers_bad_tensors_are_named_and_change_nothing(
    pupil: HTTPTrainServiceClient,
    teacher: HTTPTrainServiceClient,
    name: str,
    value: Any,
    error: type[StatusError],
) -> None:
    """Ids outside the student's vocabulary or twice at one position, masses above 1, shapes,
    dtypes, NaN."""
    before = fingerprint(pupil)
    tensors = _spoiled(_top(teacher, make_batch(), 4)["tensors"], name, value)

    with pytest.raises(error, match="teacher_topk") as caught:
        pupil.update_actor_with_distillation({"tensors": tensors}, distillation_loss="reverse_kl")

    assert caught.value.status == 422
    assert caught.value.details["tensor"] in (_IDS, _LOG_PROBS)
    assert fingerprint(pupil) == before


def test_what_stands_under_the_mask_of_a_teacher_does_not_matter(
    pupil: HTTPTrainServiceClient, teacher: HTTPTrainServiceClient
) -> None:
    request = _top(teacher, make_batch(), 4)
    clean = pupil.update_actor_with_distillation(request, distillation_loss="forward_kl")[
        "meta_info"
    ]["fingerprint"]
    pupil.load_checkpoint("pupil/start")
    hidden = ~_scored(request)[..., None]
    tensors = request["tensors"]
    tensors[_IDS] = torch.where(hidden, 10**6, tensors[_IDS])
    tensors[_LOG_PROBS] = torch.where(hidden, torch.nan, tensors[_LOG_PROBS])

    spoiled = pupil.update_actor_with_distillation(request, distillation_loss="forward_kl")

    assert spoiled["meta_info"]["fingerprint"] == clean


def test_missing_tensors_and_more_tokens_than_there_are_get_a_422(
    pupil: HTTPTrainServiceClient,
) -> None:
    before = fingerprint(pupil)
    batch = make_batch()

    with pytest.raises(InvalidTensor, match="teacher_log_probs"):
        pupil.update_actor_with_distillation(batch)
    with pytest.raises(InvalidTensor, match="loss_weights"):
        pupil.forward_backward(batch, loss="linear")
    with pytest.raises(StatusError, match="top_k") as caught:
        pupil.compute_log_prob(batch, top_k=VOCABULARY + 1)

    assert caught.value.status == 422
    assert fingerprint(pupil) == before


def test_rollout_correction_wants_the_samplers_numbers(start_group: StartGroup) -> None:
    """Without rollout_log_probs 422 and nothing changes; with them the weight of the formula is
    reported."""
    correction = {"mode": "token_truncate", "lower": 0.5, "upper": 2.0}
    client = start_group("corrected", rollout_correction=correction)
    try:
        before = fingerprint(client)
        batch = make_batch()
        with pytest.raises(InvalidTensor, match="rollout_log_probs") as caught:
            client.update_actor(batch)
        assert caught.value.status == 422
        assert fingerprint(client) == before

        old = client.compute_log_prob(batch)["batch"]["old_log_probs"]
        shift = torch.linspace(-2, 2, 30).view(5, 6)
        tensors = {**batch["tensors"], "old_log_probs": old, "rollout_log_probs": old - shift}
        metrics = client.update_actor({"tensors": tensors})["metrics"]

        weights = shift.exp().clamp(0.5, 2.0)[_scored(batch)]
        assert metrics["actor/rollout_weight_mean"] == pytest.approx(
            float(weights.mean()), rel=1e-4
        )
        assert metrics["actor/mismatch_kl"] == pytest.approx(
            float(-shift[_scored(batch)].mean()), abs=1e-4
        )
    finally:
        client.destroy()


def test_a_norm_without_its_factor_is_refused_by_name(start_group: StartGroup) -> None:
    with pytest.raises(InvalidConfig, match="loss_scale_factor") as caught:
        start_group("no-factor", loss_agg_mode="seq-mean-token-sum-norm")
    assert caught.value.status == 422
