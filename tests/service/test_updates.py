"""What comes back from an update of several optimizer steps, and what pending gradients forbid."""

from __future__ import annotations

import pytest
import torch
from nexrl_client import GradientsPending
from tensordict import TensorDict

from tests.helpers.service import StartGroup, make_batch


@pytest.mark.slow
def test_a_batch_in_any_kind_of_tensors_is_the_same_batch(start_group: StartGroup) -> None:
    """Log-probabilities and the gradient of lists, unsigned ids, whole numbers and a TensorDict are
    those of torch's."""
    client = start_group("kinds", world_size=2, optim={"lr": 0.0})
    try:
        plain = make_batch(rows=5)["tensors"]
        plain["advantages"] = torch.tensor([1.0, -1.0, 2.0, 3.0, -2.0])
        whole = plain | {"advantages": plain["advantages"].long()}
        kinds = [
            plain,
            {name: tensor.tolist() for name, tensor in whole.items()},
            {
                name: tensor.to(torch.uint16)
                for name, tensor in plain.items()
                if name != "advantages"
            }
            | {"advantages": whole["advantages"].numpy().astype("int8")},
            TensorDict(whole, batch_size=5),
        ]
        scores = [client.compute_log_prob(batch)["batch"]["old_log_probs"] for batch in kinds]
        norms = [client.update_actor(batch)["metrics"]["actor/grad_norm"] for batch in kinds]
        assert all(torch.equal(found, scores[0]) for found in scores) and bool(
            (scores[0] != 0).any()
        )
        assert norms[0] > 0 and norms == [norms[0]] * len(kinds)
    finally:
        client.destroy()


@pytest.mark.slow
def test_a_loss_of_the_clients_own_answers_for_every_row_of_every_step(
    start_group: StartGroup,
) -> None:
    """Three optimizer steps, twice over: the log-probabilities are those of the first pass, in row
    order."""
    client = start_group(
        "linear",
        world_size=2,
        policy_loss="linear",
        ppo_mini_batch_size=2,
        ppo_epochs=2,
        optim={"lr": 0.0},
    )
    try:
        batch = make_batch(rows=5)
        before = client.compute_log_prob(batch)["batch"]["old_log_probs"]
        batch["tensors"]["loss_weights"] = torch.full_like(before, -0.5)

        result = client.update_actor(batch)

        assert torch.equal(result["batch"]["log_probs"], before) and bool((before[4] != 0).any())
        assert len(result["metrics"]["step_applied"]) == 6 and all(
            result["metrics"]["step_applied"]
        )

        client.forward_backward(batch)
        with pytest.raises(GradientsPending):
            client.update_actor(batch)
        assert client.optim_step(discard=True)["meta_info"]["skipped"] == "discarded"
    finally:
        client.destroy()
