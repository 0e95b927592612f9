"""What the trainers of this folder have in common: one policy that learns one task by answering its
prompts."""

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from nexrl_client import (
    TrainServiceClient,
    TrainServiceClients,
    create_train_service_clients,
    load_service_config,
)
from policy import LocalPolicy, Rollout
from recipes import Recipe
from report import RunReport
from task import Prompt

RUNS = Path(__file__).resolve().parents[1] / "runs"


class Trainer(ABC):
    """The loop and the rollouts are the trainer's own; `reinforce` is where the algorithms
    differ."""

    phase = ""

    def __init__(
        self,
        client: TrainServiceClient,
        recipe: Recipe,
        policy: LocalPolicy,
        report: RunReport,
        seed: int,
    ):
        self.client, self.recipe, self.policy, self.report = client, recipe, policy, report
        self.step = 0
        self.sync_folder = report.folder / "sync"
        self._random = random.Random(seed)
        torch.manual_seed(seed)

    @abstractmethod
    def reinforce(self, rollout: Rollout, rewards: torch.Tensor) -> dict[str, float]:
        """One update by the rewards [B] of sampled answers, those of a prompt in a row; its "loss"
        and more numbers."""

    def run(self) -> None:
        """A few supervised steps that show the answers' form, then reinforcement."""
        self.evaluate()
        for _ in range(self.recipe.supervised_steps):
            self.supervised_step()
        if self.recipe.supervised_steps:
            self.evaluate()
        for done in range(1, self.recipe.steps + 1):
            self.reinforced_step()
            if done % self.recipe.evaluate_every == 0 or done == self.recipe.steps:
                self.evaluate()
            if self.recipe.checkpoint_every and done % self.recipe.checkpoint_every == 0:
                self.save()

    def supervised_step(self) -> None:
        """One step of cross-entropy on right answers."""
        prompts = self._draw(self.recipe.prompts_per_step * self.recipe.samples_per_prompt)
        shown = self.policy.demonstrate(
            [prompt.text for prompt in prompts], [prompt.answer for prompt in prompts]
        )
        batch = self.batch(shown.tensors)
        with self.report.clock("update"):
            result = self.client.forward_backward(batch, loss="cross_entropy")
            self.client.optim_step()
        self.step += 1
        self.sync()
        self.report.step("supervised", self.step, result["metrics"]["actor/loss"], shown.tokens)

    def reinforced_step(self) -> None:
        """Sample answers, score them, learn from the scores."""
        samples = self.recipe.samples_per_prompt
        prompts = self._draw(self.recipe.prompts_per_step)
        with self.report.clock("rollouts"):
            rollout = self.policy.answer([prompt.text for prompt in prompts], samples)
        asked = [prompt for prompt in prompts for _ in range(samples)]
        scores = [
            self.recipe.task.reward(prompt, text)
            for prompt, text in zip(asked, rollout.texts, strict=True)
        ]
        rewards = torch.tensor(scores)
        numbers = self.reinforce(rollout, rewards)
        self.step += 1
        self.sync()
        self.report.step(
            self.phase,
            self.step,
            numbers.pop("loss"),
            rollout.tokens,
            float(rewards.mean()),
            **numbers,
        )

    def sync(self) -> None:
        """Publish the service's weights as a Hugging Face folder and take them into the local
        copy."""
        with self.report.clock("weight sync"):
            self.client.save_checkpoint(
                local_path=str(self.sync_folder),
                global_step=self.step,
                saved_fully_shared_ckpt=False,
                save_weight_only=True,
                remove_previous_ckpt=False,
            )
            self.policy.refresh(self.sync_folder)

    def save(self) -> None:
        """A full checkpoint (weights, optimizer, schedule), from which training could go on."""
        with self.report.clock("checkpoints"):
            path = self.report.folder / "checkpoints" / f"global_step_{self.step}"
            self.client.save_checkpoint(local_path=str(path), global_step=self.step)

    def evaluate(self) -> None:
        """Mean reward of greedy answers to prompts that are never trained on."""
        prompts = self.recipe.task.held_out
        with self.report.clock("evaluation"):
            answers = self.policy.answer([prompt.text for prompt in prompts], greedy=True).texts
        scores = [
            self.recipe.task.reward(prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self.report.evaluated(self.step, sum(scores) / len(scores))

    def sample_answers(self) -> list[str]:
        """One sampled answer to each of the prompts that the run shows."""
        with self.report.clock("evaluation"):
            return self.policy.answer([prompt.text for prompt in self.recipe.shown]).texts

    def batch(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A request's batch."""
        return {"tensors": tensors, "metadata": {"temperature": 1.0, "global_step": self.step}}

    def _draw(self, count: int) -> list[Prompt]:
        """Different prompts as long as there are any."""
        train = self.recipe.task.train
        return (
            self._random.sample(train, count)
            if count <= len(train)
            else self._random.choices(train, k=count)
        )


def run_folder(path: Path) -> Path:
    """The run's folder, made where it is missing. Also leaves the cores to the service, which
    shares them."""
    torch.set_num_threads(1)  # threads that wait for each other's turn crawl
    folder = path.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def started_groups(service_file: Path, report: RunReport) -> Iterator[TrainServiceClients]:
    """A client for every service of the file, its group started and its model loaded; ends the
    groups afterwards."""
    config = load_service_config(service_file)
    with create_train_service_clients(config) as clients, ExitStack() as groups:
        with report.clock("group start"):
            for client in clients.values():
                client.initialize_worker()
                groups.callback(client.destroy)
                client.init_model()
        yield clients


def common_options(description: str, world_size: int) -> argparse.ArgumentParser:
    """A command line with what every example takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway")
    parser.add_argument(
        "--world-size", type=int, default=world_size, help="ranks that share a model"
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the main part (default: the recipe's)"
    )
    parser.add_argument("--lr", type=float, help="learning rate (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    started = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument(
        "--output", type=Path, default=RUNS / started, help="folder for log, curve, weights"
    )
    return parser
