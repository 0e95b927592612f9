"""On-policy distillation through the training service: a small student learns from a teacher's
opinion of its own samples.

Run it against a stack that `nexrl up` started: `python examples/distill.py --url
http://127.0.0.1:8000`.
"""

import argparse
import json
import random
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import make_tiny_model
from nexrl_client import (
    HTTPTrainServiceClient,
    TrainServiceClient,
    response_mask,
)
from policy import LocalPolicy, Rollout
from report import Goal, RunReport
from task import CountingLanguage
from trainer import common_options, run_folder, started_groups
from transformers.utils.logging import disable_progress_bar

SERVICE = """\
service:
  train_service:
    student:
      role: actor
      url: {url}
      resource: {{world_size: {world_size}}}
      actor:
        model: {{path: {student}}}
        optim: {{lr: {lr}, lr_warmup_steps: 4}}
        distillation_loss: {loss}
    teacher:                      # forward only: no optimizer is made for it
      role: teacher
      url: {url}
      resource: {{world_size: {world_size}}}
      actor:
        model: {{path: {teacher}}}
"""
LOSSES = ("policy_gradient", "forward_kl", "reverse_kl")
GOAL = Goal(
    title="Distillation",
    target=0.5,
    name="KL",
    falls=True,
    sampled="estimate from the training samples",
    held_out="exact, on held-out prompts",
    verdicts=(
        "The student came close to its teacher.",
        "The student did not come close to its teacher.",
    ),
)


@dataclass
class Recipe:
    """Sizes of the run; B = prompts_per_step x samples_per_prompt."""

    language: CountingLanguage = field(default_factory=CountingLanguage)
    teacher_steps: int = 40
    steps: int = 60
    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    lr: float = 1e-3
    evaluate_every: int = 10

    @property
    def max_new_tokens(self) -> int:
        """The digits of a sentence and its end."""
        return self.language.length + 1


class Distiller:
    """The student's samples, the teacher's opinion of them, and the student's update."""

    def __init__(
        self,
        student: TrainServiceClient,
        teacher: TrainServiceClient,
        recipe: Recipe,
        policy: LocalPolicy,
        report: RunReport,
        top_k: int | None,
        seed: int,
    ):
        self.student, self.teacher, self.recipe, self.policy, self.report = (
            student,
            teacher,
            recipe,
            policy,
            report,
        )
        self.top_k = top_k
        self.step = 0
        self.sync_folder = report.folder / "sync"
        self._random = random.Random(seed)
        torch.manual_seed(seed)

    def run(self) -> None:
        """Distil, and measure now and then."""
        self.evaluate()
        for done in range(1, self.recipe.steps + 1):
            self.distillation_step()
            if done % self.recipe.evaluate_every == 0 or done == self.recipe.steps:
                self.evaluate()

    def distillation_step(self) -> None:
        """Sample from the student, ask the teacher, update: by the sampled tokens or by the
        teacher's top k."""
        beginnings = self._random.choices(
            self.recipe.language.train, k=self.recipe.prompts_per_step
        )
        with self.report.clock("rollouts"):
            prompts = [self.recipe.language.prompt(beginning) for beginning in beginnings]
            rollout = self.policy.answer(prompts, self.recipe.samples_per_prompt)
        batch = self._batch(rollout)
        tensors = batch["tensors"]
        with self.report.clock("teacher"):
            opinion = self.teacher.compute_log_prob(batch, top_k=self.top_k)["batch"]
        if self.top_k is None:
            tensors["teacher_log_probs"] = opinion["old_log_probs"]
        else:
            tensors |= {
                name: opinion[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs")
            }
        with self.report.clock("update"):
            metrics = self.student.update_actor_with_distillation(batch)["metrics"]
        self.step += 1
        self.sync()
        self.report.step(
            "distil", self.step, metrics["actor/loss"], rollout.tokens, metrics["actor/teacher_kl"]
        )

    def sync(self) -> None:
        """Take the student's new weights into the local copy that samples."""
        with self.report.clock("weight sync"):
            publish(self.student, self.sync_folder)
            self.policy.refresh(self.sync_folder)

    def evaluate(self) -> None:
        """Mean KL(student || teacher) of a token, over the whole vocabulary, where the student goes
        on held-out prompts."""
        with self.report.clock("evaluation"), torch.random.fork_rng():
            torch.manual_seed(0)
            prompts = [
                self.recipe.language.prompt(beginning)
                for beginning in self.recipe.language.held_out
            ]
            batch = self._batch(self.policy.answer(prompts, samples=4))
            student, teacher = (
                self._distributions(client, batch) for client in (self.student, self.teacher)
            )
            divergence = (student.exp() * (student - teacher)).sum(dim=-1)
            tensors = batch["tensors"]
            scored = response_mask(tensors["loss_mask"], tensors["responses"].shape[1]).bool()
        self.report.evaluated(self.step, float(divergence[scored].mean()))

    def _distributions(self, client: TrainServiceClient, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities [B, R, V] of a group's model: its top V tokens, put in the vocabulary's
        order."""
        best = client.compute_log_prob(batch, top_k=self.policy.model.config.vocab_size)["batch"]
        values = best["teacher_topk_log_probs"]
        return torch.empty_like(values).scatter(-1, best["teacher_topk_ids"], values)

    def _batch(self, rollout: Rollout) -> dict[str, Any]:
        return {
            "tensors": dict(rollout.tensors),
            "metadata": {"temperature": 1.0, "global_step": self.step},
        }


def publish(client: TrainServiceClient, folder: Path) -> None:
    """The group's weights as a Hugging Face folder."""
    client.save_checkpoint(
        local_path=str(folder), saved_fully_shared_ckpt=False, remove_previous_ckpt=False
    )


def make_teacher(folder: Path, options: argparse.Namespace, recipe: Recipe) -> Path:
    """A model of twice the student's layers that has read some sentences; returns its folder."""
    start = make_tiny_model(folder / "untaught", CountingLanguage.words, options.seed)
    pupil = LocalPolicy(start, recipe.max_new_tokens)
    draw = random.Random(options.seed)
    config = {"actor": {"model": {"path": str(start)}, "optim": {"lr": 2e-3, "lr_warmup_steps": 4}}}
    losses = []
    with HTTPTrainServiceClient(options.url, "teacher-to-be") as client, ExitStack() as group:
        client.initialize_worker(config_dict=config, role="actor", world_size=options.world_size)
        group.callback(client.destroy)
        client.init_model()
        for _ in range(recipe.teacher_steps):
            beginnings = draw.choices(recipe.language.train, k=96)
            sentences = [recipe.language.sentence(beginning, draw) for beginning in beginnings]
            shown = pupil.demonstrate(
                [recipe.language.prompt(beginning) for beginning in beginnings], sentences
            )
            result = client.forward_backward({"tensors": shown.tensors}, loss="cross_entropy")
            losses.append(result["metrics"]["actor/loss"])
            client.optim_step()
        publish(client, folder / "teacher")
    print(
        f"The teacher's cross-entropy fell from {losses[0]:.2f} to {losses[-1]:.2f} in "
        f"{len(losses)} steps."
    )
    return folder / "teacher"


def service_file(folder: Path, options: argparse.Namespace, student: Path, teacher: Path) -> Path:
    """The run's two worker groups as a YAML file."""
    text = SERVICE.format(
        url=options.url,
        world_size=options.world_size,
        student=json.dumps(str(student)),
        teacher=json.dumps(str(teacher)),
        lr=options.lr,
        loss=options.loss,
    )
    path = folder / "service.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> int:
    """Distil; the exit code is 0 where the student's KL to the teacher fell as it should."""
    disable_progress_bar()
    options, recipe = parse_options()
    folder = run_folder(options.output)
    report = RunReport(folder, GOAL, recipe.steps)
    with report.clock("making the teacher"):
        teacher_folder = make_teacher(folder, options, recipe)
    student_folder = make_tiny_model(
        folder / "model", CountingLanguage.words, options.seed + 1, layers=2
    )
    policy = LocalPolicy(student_folder, recipe.max_new_tokens)

    with started_groups(
        service_file(folder, options, student_folder, teacher_folder), report
    ) as clients:
        top_k = None if options.loss == "policy_gradient" else options.top_k
        student, teacher = clients["student"], clients["teacher"]
        with report:
            Distiller(student, teacher, recipe, policy, report, top_k, options.seed).run()
    return 0 if report.finish() else 1


def parse_options() -> tuple[argparse.Namespace, Recipe]:
    """Read the command line."""
    recipe = Recipe()
    parser = common_options(
        "Distil a teacher into a student through a running training service.", 1
    )
    parser.add_argument(
        "--loss", choices=LOSSES, default="policy_gradient", help="how the student learns"
    )
    parser.add_argument(
        "--top-k", type=int, default=4, help="tokens that the teacher sends, for the two KL losses"
    )
    options = parser.parse_args()
    recipe.steps = options.steps or recipe.steps
    options.lr = recipe.lr if options.lr is None else options.lr
    return options, recipe


if __name__ == "__main__":
    sys.exit(main())
