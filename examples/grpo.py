"""GRPO through the training service: own rollouts here, the heavy part (forward, backward,
optimizer) over there.

Run it against a stack that `nexrl up` started: `python examples/grpo.py --url
http://127.0.0.1:8000`.
"""

import argparse
import sys
from dataclasses import replace

import torch
from nexrl_client import create_train_service_client, group_relative_advantages
from policy import LocalPolicy, Rollout
from recipes import RECIPES
from report import Goal, RunReport
from trainer import Trainer, common_options, run_folder
from transformers.utils.logging import disable_progress_bar


class GRPOTrainer(Trainer):
    """An answer's advantage is how far it stands above the other answers to its prompt."""

    phase = "GRPO"

    def reinforce(self, rollout: Rollout, rewards: torch.Tensor) -> dict[str, float]:
        """See Trainer."""
        groups = torch.arange(len(rewards)) // self.recipe.samples_per_prompt
        batch = self.batch(
            {**rollout.tensors, "advantages": group_relative_advantages(rewards, groups)}
        )
        with self.report.clock("compute_log_prob"):
            batch["tensors"]["old_log_probs"] = self.client.compute_log_prob(batch)["batch"][
                "old_log_probs"
            ]
        with self.report.clock("update"):
            metrics = self.client.update_actor(batch)["metrics"]
        return {"loss": metrics["actor/pg_loss"]}


def main() -> int:
    """Run one recipe; the exit code is 0 where the policy learned its task."""
    disable_progress_bar()
    options = parse_options()
    recipe = RECIPES[options.model]()
    recipe = replace(
        recipe,
        steps=options.steps or recipe.steps,
        lr=recipe.lr if options.lr is None else options.lr,
    )
    folder = run_folder(options.output)
    model = recipe.model(folder, options.seed)
    policy = LocalPolicy(model, recipe.max_new_tokens)
    report = RunReport(folder, Goal("GRPO", recipe.target), recipe.steps, recipe.supervised_steps)

    client = create_train_service_client(
        backend="self-hosted", url=options.url, identifier=options.identifier
    )
    config = {"actor": {"model": {"path": str(model)}, "optim": recipe.optim}}
    with report.clock("group start"):
        client.initialize_worker(config_dict=config, role="actor", world_size=options.world_size)
    try:
        with report.clock("group start"):
            client.init_model()
        trainer = GRPOTrainer(client, recipe, policy, report, options.seed)
        before = trainer.sample_answers()
        with report:
            trainer.run()
        report.show_answers(recipe.shown, before, trainer.sample_answers())
    finally:
        client.destroy()
    return 0 if report.finish() else 1


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = common_options(
        "Train a policy with GRPO through a running training service.", world_size=2
    )
    parser.add_argument("--identifier", default="student", help="name of the worker group")
    parser.add_argument("--model", choices=RECIPES, default="tiny")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
