"""GRPO through the training service: own rollouts here, the heavy part (forward, backward, optimizer) over there.

Run it against a stack that `nexrl up` started: `python examples/grpo.py --url http://127.0.0.1:8000`.
"""

import argparse
import random
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from nexrl_client import TrainServiceClient, create_train_service_client
from policy import LocalPolicy
from recipes import RECIPES, Recipe
from report import RunReport
from task import Prompt
from transformers.utils.logging import disable_progress_bar

RUNS = Path(__file__).resolve().parents[1] / "runs"


class Trainer:
    """One policy that learns one task: the loop and the rollouts are the trainer's own."""

    def __init__(self, client: TrainServiceClient, recipe: Recipe, policy: LocalPolicy, report: RunReport, seed: int):
        self.client, self.recipe, self.policy, self.report = client, recipe, policy, report
        self.step = 0
        self.sync_folder = report.folder / "sync"
        self._random = random.Random(seed)
        torch.manual_seed(seed)

    def run(self) -> None:
        """A few supervised steps that show the answers' form, then GRPO."""
        self.evaluate()
        for _ in range(self.recipe.supervised_steps):
            self.supervised_step()
        if self.recipe.supervised_steps:
            self.evaluate()
        for done in range(1, self.recipe.steps + 1):
            self.grpo_step()
            if done % self.recipe.evaluate_every == 0 or done == self.recipe.steps:
                self.evaluate()
            if self.recipe.checkpoint_every and done % self.recipe.checkpoint_every == 0:
                self.save()

    def supervised_step(self) -> None:
        """One step of cross-entropy on right answers."""
        prompts = self._draw(self.recipe.prompts_per_step * self.recipe.samples_per_prompt)
        shown = self.policy.demonstrate([prompt.text for prompt in prompts], [prompt.answer for prompt in prompts])
        batch = self._batch(shown.tensors)
        with self.report.clock("update"):
            result = self.client.forward_backward(batch, loss="cross_entropy")
            self.client.optim_step()
        self.step += 1
        self.sync()
        self.report.step("supervised", self.step, result["metrics"]["actor/loss"], shown.tokens)

    def grpo_step(self) -> None:
        """Sample a group of answers per prompt, score them, and reinforce what beat its own group."""
        samples = self.recipe.samples_per_prompt
        prompts = self._draw(self.recipe.prompts_per_step)
        with self.report.clock("rollouts"):
            rollout = self.policy.answer([prompt.text for prompt in prompts], samples)
        asked = [prompt for prompt in prompts for _ in range(samples)]
        scores = [self.recipe.task.reward(prompt, text) for prompt, text in zip(asked, rollout.texts, strict=True)]
        rewards = torch.tensor(scores).view(len(prompts), samples)

        batch = self._batch({**rollout.tensors, "advantages": group_advantages(rewards)})
        with self.report.clock("compute_log_prob"):
            batch["tensors"]["old_log_probs"] = self.client.compute_log_prob(batch)["batch"]["old_log_probs"]
        with self.report.clock("update"):
            metrics = self.client.update_actor(batch)["metrics"]
        self.step += 1
        self.sync()
        self.report.step("GRPO", self.step, metrics["actor/pg_loss"], rollout.tokens, float(rewards.mean()))

    def sync(self) -> None:
        """Publish the service's weights as a Hugging Face folder and take them into the local copy."""
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
        scores = [self.recipe.task.reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        self.report.evaluated(self.step, sum(scores) / len(scores))

    def sample_answers(self) -> list[str]:
        """One sampled answer to each of the prompts that the run shows."""
        with self.report.clock("evaluation"):
            return self.policy.answer([prompt.text for prompt in self.recipe.shown]).texts

    def _draw(self, count: int) -> list[Prompt]:
        return self._random.sample(self.recipe.task.train, count)

    def _batch(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"tensors": tensors, "metadata": {"temperature": 1.0, "global_step": self.step}}


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's advantage: how far each answer stands above its own group, in the group's deviations. [P, G] -> [P * G]"""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return (centred / (rewards.std(dim=1, keepdim=True) + 1e-6)).flatten()


def main() -> int:
    """Run one recipe; the exit code is 0 where the policy learned its task."""
    disable_progress_bar()
    options = parse_options()
    recipe = RECIPES[options.model]()
    recipe = replace(recipe, steps=options.steps or recipe.steps, lr=recipe.lr if options.lr is None else options.lr)
    torch.set_num_threads(1)  # the service shares these cores, and threads that wait for each other's turn crawl
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = recipe.model(folder, options.seed)
    policy = LocalPolicy(model, recipe.max_new_tokens)
    report = RunReport(folder, recipe.supervised_steps, recipe.steps, recipe.target)

    client = create_train_service_client(backend="self-hosted", url=options.url, identifier=options.identifier)
    config = {"actor": {"model": {"path": str(model)}, "optim": recipe.optim}}
    with report.clock("group start"):
        client.initialize_worker(config_dict=config, role="actor", world_size=options.world_size)
    try:
        with report.clock("group start"):
            client.init_model()
        trainer = Trainer(client, recipe, policy, report, options.seed)
        before = trainer.sample_answers()
        with report:
            trainer.run()
        report.show_answers(recipe.shown, before, trainer.sample_answers())
    finally:
        client.destroy()
    return 0 if report.finish() else 1


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a policy with GRPO through a running training service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway")
    parser.add_argument("--identifier", default="student", help="name of the worker group")
    parser.add_argument("--world-size", type=int, default=2, help="ranks that share the model")
    parser.add_argument("--model", choices=RECIPES, default="tiny")
    parser.add_argument("--steps", type=int, help="GRPO steps (default: the model's recipe)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the model's recipe)")
    parser.add_argument("--seed", type=int, default=0)
    started = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument("--output", type=Path, default=RUNS / started, help="folder for log, curve, weights")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
