"""What comes back from an update of several optimizer steps, and what pending gradients forbid."""

from __future__ import annotations

import pytest
import torch
from nexrl_client import GradientsPending
from service_kit import StartGroup, make_batch


@pytest.mark.slow
def test_a_loss_of_the_clients_own_answers_for_every_row_of_every_step(start_group: StartGroup) -> None:
    """Three optimizer steps, twice over: the log-probabilities are those of the first pass, in row order."""
    client = start_group(
        "linear", world_size=2, policy_loss="linear", ppo_mini_batch_size=2, ppo_epochs=2, optim={"lr": 0.0}
    )
    try:
        batch = make_batch(rows=5)
        before = client.compute_log_prob(batch)["batch"]["old_log_probs"]
        batch["tensors"]["loss_weights"] = torch.full_like(before, -0.5)

        result = client.update_actor(batch)

        assert torch.equal(result["batch"]["log_probs"], before) and bool((before[4] != 0).any())
        assert len(result["metrics"]["step_applied"]) == 6 and all(result["metrics"]["step_applied"])

        client.forward_backward(batch)
        with pytest.raises(GradientsPending):
            client.update_actor(batch)
        assert client.optim_step(discard=True)["meta_info"]["skipped"] == "discarded"
    finally:
        client.destroy()
