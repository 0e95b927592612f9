"""The other two trainers: each learns through two groups, and says so by its exit code where it did
not."""

from __future__ import annotations

import pytest
from nexrl_client import HTTPTrainServiceClient, load_service_config

from tests.helpers.demo_runs import log_of, run_demo
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_student_comes_close_to_its_teacher(stack: Stack) -> None:
    """The exact KL on held-out prompts falls to half at most; both groups' slots are free again."""
    done, folder = run_demo(stack, "distils", program="distill")

    assert done.returncode == 0, done.stdout + done.stderr
    measured = [line["KL"] for line in log_of(folder, "held-out")]
    assert measured[-1] <= 0.5 * measured[0]
    assert len(log_of(folder, "distil")) == 60
    assert (folder / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert set(load_service_config(folder / "service.yaml")) == {"student", "teacher"}
    assert HTTPTrainServiceClient(stack.url).health_check()["slots"]["free"] == 2


def test_without_a_learning_rate_the_student_stays_away_and_the_exit_code_says_so(
    stack: Stack,
) -> None:
    """By the teacher's top tokens: the very KL of the start, measured on the same samples."""
    options = ("--lr", "0", "--steps", "2", "--loss", "reverse_kl")
    done, folder = run_demo(stack, "distils-not", *options, program="distill")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not come close" in done.stdout
    first, last = (line["KL"] for line in log_of(folder, "held-out"))
    assert first == last


def test_actor_and_critic_learn_together(stack: Stack) -> None:
    """A short run: the held-out reward rises clearly, and every step says how much the critic
    foresaw."""
    done, folder = run_demo(stack, "ppo", "--steps", "20", program="ppo")

    assert done.returncode in (0, 1), done.stdout + done.stderr
    start, after_supervised, *_, end = [line["reward"] for line in log_of(folder, "held-out")]
    assert end > max(start, after_supervised) + 0.2
    steps = log_of(folder, "PPO")
    assert len(steps) == 20
    assert all(step["explained_variance"] < 1 for step in steps)
    assert "explained variance" in done.stdout
    assert (folder / "reward.png").exists()
