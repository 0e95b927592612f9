"""PPO with a critic through the training service: two worker groups, advantages by GAE made here in
between.

Run it against a stack that `nexrl up` started: `python examples/ppo.py --url
http://127.0.0.1:8000`.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from nexrl_client import (
    TrainServiceClient,
    gae,
    response_mask,
    whiten,
)
from policy import LocalPolicy, Rollout
from recipes import Recipe, ppo_recipe
from report import Goal, RunReport
from trainer import Trainer, common_options, run_folder, started_groups
from transformers.utils.logging import disable_progress_bar

SERVICE = """\
service:
  train_service:
    policy:
      role: actor
      url: {url}
      resource: {{world_size: {world_size}}}
      actor:
        model: {{path: {model}}}
        optim: {actor_optim}
        policy_loss: ppo
        clip_ratio: 0.2
    critic:                       # its head starts at zero, on the backbone of the same folder
      role: critic
      url: {url}
      resource: {{world_size: {world_size}}}
      actor:
        model: {{path: {model}}}
        optim: {critic_optim}
        cliprange_value: 0.5
        ppo_mini_batch_size: 64   # a critic starts from nothing: eight steps to the policy's one
        ppo_epochs: 2
"""


class PPOTrainer(Trainer):
    """A token's advantage is what the critic did not foresee."""

    phase = "PPO"

    def __init__(
        self,
        actor: TrainServiceClient,
        critic: TrainServiceClient,
        recipe: Recipe,
        policy: LocalPolicy,
        report: RunReport,
        seed: int,
    ):
        super().__init__(actor, recipe, policy, report, seed)
        self.critic = critic

    def reinforce(self, rollout: Rollout, rewards: torch.Tensor) -> dict[str, float]:
        """See Trainer. The two groups work side by side: each call is submitted before one is
        waited for."""
        batch = self.batch(rollout.tensors)
        tensors = batch["tensors"]
        with self.report.clock("log-probs and values"):
            old, values = (
                self.client.submit("compute_log_prob", batch),
                self.critic.submit("compute_values", batch),
            )
            tensors["old_log_probs"] = old.result(self.client.request_timeout)["batch"][
                "old_log_probs"
            ]
            tensors["values"] = values.result(self.critic.request_timeout)["batch"]["values"]
        scored = response_mask(tensors["loss_mask"], tensors["responses"].shape[1])
        advantages, tensors["returns"] = gae(
            on_last_token(rewards, scored), tensors["values"], scored
        )
        tensors["advantages"] = whiten(advantages, scored)
        with self.report.clock("update"):
            updates = (
                self.client.submit("update_actor", batch),
                self.critic.submit("update_critic", batch),
            )
            actor, critic = (job.result(self.client.request_timeout)["metrics"] for job in updates)
        # Of the first mini-batch, so of values before this update: how much of the returns the
        # critic foresaw.
        return {
            "loss": actor["actor/pg_loss"],
            "explained_variance": critic["critic/explained_variance"][0],
        }


def on_last_token(rewards: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """[B, R]: each reward [B] on its answer's last scored token, 0 elsewhere."""
    last = scored.cumsum(dim=1) == scored.sum(dim=1, keepdim=True)
    return rewards[:, None] * (last & (scored == 1))


def service_file(folder: Path, options: argparse.Namespace, recipe: Recipe, model: Path) -> Path:
    """The run's two worker groups as a YAML file."""
    critic_optim = {"lr": recipe.lr, "lr_warmup_steps": recipe.warmup_steps}
    text = SERVICE.format(
        url=options.url,
        world_size=options.world_size,
        model=json.dumps(str(model)),
        actor_optim=json.dumps(recipe.optim),
        critic_optim=json.dumps(critic_optim),
    )
    path = folder / "service.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> int:
    """Train actor and critic; the exit code is 0 where the policy learned its task."""
    disable_progress_bar()
    options = common_options(
        "Train with PPO and a critic through a running training service.", 1
    ).parse_args()
    recipe = ppo_recipe()
    recipe = replace(
        recipe,
        steps=options.steps or recipe.steps,
        lr=recipe.lr if options.lr is None else options.lr,
    )
    folder = run_folder(options.output)
    model = recipe.model(folder, options.seed)
    policy = LocalPolicy(model, recipe.max_new_tokens)
    report = RunReport(folder, Goal("PPO", recipe.target), recipe.steps, recipe.supervised_steps)

    with started_groups(service_file(folder, options, recipe, model), report) as clients:
        actor, critic = clients.by_role("actor"), clients.by_role("critic")
        trainer = PPOTrainer(actor, critic, recipe, policy, report, options.seed)
        before = trainer.sample_answers()
        with report:
            trainer.run()
        report.show_answers(recipe.shown, before, trainer.sample_answers())
    return 0 if report.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
