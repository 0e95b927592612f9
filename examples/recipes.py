"""The runs by reward: which model learns which task, in how many steps of what size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models import make_tiny_model, smollm2_folder
from task import MinMaxTask, Prompt, ShortAnswerTask, Task


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs beside the service. `target`: the held-out reward that counts as
    learned."""

    task: Task
    model: Callable[[Path, int], Path]
    steps: int
    supervised_steps: int
    prompts_per_step: int
    samples_per_prompt: int
    max_new_tokens: int
    lr: float
    warmup_steps: int
    evaluate_every: int
    checkpoint_every: int
    target: float

    @property
    def optim(self) -> dict[str, object]:
        """The service's optimizer settings: a decay to 0, so that the last noisy steps do not undo
        the earlier ones."""
        total = self.supervised_steps + self.steps
        schedule = {
            "lr_warmup_steps": self.warmup_steps,
            "lr_scheduler": "linear",
            "total_training_steps": total,
        }
        return {"lr": self.lr, **schedule}

    @property
    def shown(self) -> list[Prompt]:
        """A few held-out prompts whose answers are printed before and after."""
        held_out = self.task.held_out
        return held_out[:: max(1, len(held_out) // 6)][:6]


def tiny_recipe() -> Recipe:
    """1.6 million random weights learn the larger or smaller of three digits, in about two
    minutes."""
    return Recipe(
        task=MinMaxTask(),
        model=lambda folder, seed: make_tiny_model(folder / "model", MinMaxTask.words, seed),
        steps=60,
        supervised_steps=6,
        prompts_per_step=64,
        samples_per_prompt=8,
        max_new_tokens=2,
        lr=7e-4,
        warmup_steps=5,
        evaluate_every=10,
        checkpoint_every=20,
        target=0.8,
    )


def smollm2_recipe() -> Recipe:
    """SmolLM2-135M-Instruct learns to answer questions rightly and briefly: a few steps, some
    minutes."""
    return Recipe(
        task=ShortAnswerTask(),
        model=lambda folder, seed: smollm2_folder(),
        steps=6,
        supervised_steps=0,
        prompts_per_step=4,
        samples_per_prompt=6,
        max_new_tokens=20,
        lr=2e-5,
        warmup_steps=0,
        evaluate_every=3,
        checkpoint_every=0,
        target=0.6,
    )


def ppo_recipe() -> Recipe:
    """The same random weights learn the larger or smaller of two digits, beside a critic of their
    size."""
    return Recipe(
        task=MinMaxTask(digits=2),
        model=lambda folder, seed: make_tiny_model(folder / "model", MinMaxTask.words, seed),
        steps=40,
        supervised_steps=4,
        prompts_per_step=64,
        samples_per_prompt=4,
        max_new_tokens=2,
        lr=7e-4,
        warmup_steps=4,
        evaluate_every=8,
        checkpoint_every=0,
        target=0.8,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny_recipe, "smollm2": smollm2_recipe}
