"""The demo itself: a policy learns through the whole service, and does not where it must not."""

from __future__ import annotations

import pytest

from tests.helpers.demo_runs import log_of, run_demo, same_weights
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_policy_learns_and_the_run_leaves_its_records(stack: Stack) -> None:
    """From chance to 0.8 on prompts never trained on, and most of it by reinforcement."""
    done, folder = run_demo(stack, "learns")

    assert done.returncode == 0, done.stdout + done.stderr
    start, after_supervised, *_, end = [line["reward"] for line in log_of(folder, "held-out")]
    assert start < 0.2
    assert after_supervised < 0.5
    assert end >= 0.8
    sampled = [line["reward"] for line in log_of(folder, "GRPO")]
    assert len(sampled) == 60
    assert sum(sampled[-5:]) / 5 > sum(sampled[:5]) / 5 + 0.3
    assert "The policy learned its task." in done.stdout
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "global_step_66").is_dir()


def test_without_a_learning_rate_nothing_is_learned_and_the_exit_code_says_so(stack: Stack) -> None:
    """The weights stay as they were, bit for bit: a run of any length would end the same."""
    done, folder = run_demo(stack, "lr-zero", "--lr", "0", "--steps", "3")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not learn" in done.stdout
    assert max(line["reward"] for line in log_of(folder, "held-out")) < 0.3
    assert same_weights(folder / "model", folder / "sync")
