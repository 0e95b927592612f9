"""The numbers of a real model at world size 2, against transformers and a plain loop of the same
two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import smollm2_folder
from nexrl_client import HTTPTrainServiceClient
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.stack import Stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning"
    ),  # gguf, where the model is converted first
]

TEXTS = (
    ("What is the capital of France?", " The capital of France is Paris, a city on the Seine."),
    ("Count to five.", " One, two, three, four, five."),
    ("Who wrote Hamlet?", " William Shakespeare wrote it around 1600."),
    ("Is the sky green?", " No."),
)
TEMPERATURE = 0.9
LR, DECAY, CLIP = 2e-5, 0.01, 0.2


@dataclass(frozen=True)
class Texts:
    """Left-padded prompts and right-padded answers, as trainers send them."""

    input_ids: Tensor
    attention_mask: Tensor
    responses: Tensor
    advantages: Tensor

    @property
    def mask(self) -> Tensor:
        return self.attention_mask[:, -self.responses.shape[1] :].bool()

    def batch(self, **more: Tensor) -> dict[str, Any]:
        tensors = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "responses": self.responses,
            "advantages": self.advantages,
            **more,
        }
        return {"tensors": tensors, "metadata": {"temperature": TEMPERATURE}}


@pytest.fixture(scope="module")
def texts() -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    pairs = [(tokenizer(prompt).input_ids, tokenizer(answer).input_ids) for prompt, answer in TEXTS]
    before, after = (max(len(pair[side]) for pair in pairs) for side in (0, 1))
    ids = torch.zeros(len(pairs), before + after, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(pairs):
        start, end = before - len(prompt), before + len(answer)
        ids[row, start:end] = torch.tensor(prompt + answer)
        attention[row, start:end] = 1
    gains = torch.tensor([1.0, -0.5, 0.8, -1.2])[:, None].expand(-1, after).contiguous()
    return Texts(ids, attention, ids[:, before:].clone(), gains)


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[HTTPTrainServiceClient]:
    client = HTTPTrainServiceClient(stack.url, "smollm2-numbers", request_timeout=600)
    actor = {
        "model": {"path": str(smollm2_folder())},
        "optim": {"lr": LR, "weight_decay": DECAY},
        "ppo_micro_batch_size_per_gpu": 1,
        "loss_agg_mode": "seq-mean-token-mean",
    }
    client.initialize_worker(config_dict={"actor": actor}, world_size=2)
    client.init_model()
    yield client
    client.destroy()


def log_probs(model: torch.nn.Module, texts: Texts) -> Tensor:
    """[B,R] by transformers, one row at a time without its padding; 0 where nothing stands."""
    width = texts.responses.shape[1]
    lines = []
    for ids, attention in zip(texts.input_ids, texts.attention_mask, strict=True):
        alone = ids[attention.bool()]
        logits = model(input_ids=alone[None]).logits[0].float() / TEMPERATURE
        scores = torch.log_softmax(logits[:-1], dim=-1).gather(1, alone[1:, None])[:, 0]
        answer = scores[-int(attention[-width:].sum()) :]
        lines.append(torch.cat([answer, answer.new_zeros(width - len(answer))]))
    return torch.stack(lines)


def mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[kept].mean() for row, kept in zip(values, mask, strict=True)]).mean()


def clipped(scores: Tensor, old: Tensor, texts: Texts) -> Tensor:
    ratio = torch.exp(scores - old)
    gains = texts.advantages
    return mean_of_means(
        torch.max(-gains * ratio, -gains * ratio.clamp(1 - CLIP, 1 + CLIP)), texts.mask
    )


def test_two_steps_are_those_of_a_plain_loop(client: HTTPTrainServiceClient, texts: Texts) -> None:
    """Log-probabilities are transformers' own to 1e-4; an SFT step and a GRPO step lower the loss
    as the loop does."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    mask = texts.mask

    def plain_step(loss: Tensor) -> tuple[float, float]:
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return loss.item(), float(norm)

    with torch.no_grad():
        wanted = log_probs(model, texts)
    found = client.compute_log_prob(texts.batch())["batch"]["old_log_probs"]
    assert (found - wanted)[mask].abs().max() <= 1e-4

    loss, norm = plain_step(mean_of_means(-log_probs(model, texts), mask))
    metrics = client.forward_backward(texts.batch(), loss="cross_entropy")["metrics"]
    assert metrics["actor/loss"] == pytest.approx(loss, rel=1e-4)
    assert client.optim_step()["metrics"]["actor/grad_norm"] == pytest.approx(norm, rel=1e-3)

    old = client.compute_log_prob(texts.batch())["batch"]["old_log_probs"]
    with torch.no_grad():
        after = log_probs(model, texts)
    assert (old - after)[mask].abs().max() <= 1e-3
    assert mean_of_means(-old, mask) < loss - 0.05
    assert mean_of_means(-old, mask).item() == pytest.approx(
        mean_of_means(-after, mask).item(), rel=1e-3
    )

    first, norm = plain_step(clipped(log_probs(model, texts), after, texts))
    result = client.update_actor(texts.batch(old_log_probs=old))["metrics"]
    assert (
        result["actor/pg_loss"] == pytest.approx(first, abs=1e-4)
        and result["actor/ratio_max"] == 1.0
    )
    assert result["actor/grad_norm"] == pytest.approx(norm, rel=5e-3)
    new = client.compute_log_prob(texts.batch())["batch"]["old_log_probs"]
    with torch.no_grad():
        second = clipped(log_probs(model, texts), after, texts).item()
    mine = clipped(new, old, texts).item()
    assert mine < first - 0.01 and second < first - 0.01
    assert mine - first == pytest.approx(second - first, rel=0.05)
