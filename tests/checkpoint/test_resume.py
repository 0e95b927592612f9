"""The real engine resumes from a checkpoint at another world size as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nexrl_checkpointer.publish import PublishRequest, publish
from nexrl_contract.names import new_job_id
from transformers import AutoModelForCausalLM

from tests.helpers.engines import save_model
from tests.helpers.rank_processes import run_ranks
from tests.helpers.toy_checkpoints import publish_params

RANKS = "checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_save_and_one_goes_on_where_they_were(tmp_path: Path) -> None:
    """Weights, both moments and the step count come back: the next update gives what it gives
    without the interruption."""
    save_model(tmp_path / "model")
    job_id = new_job_id()
    (tmp_path / "staging").mkdir()
    for phase in ("save", "load"):
        (tmp_path / f"after-{phase}").mkdir()
    run_ranks(2, "save", tmp_path, program=RANKS)
    params = {
        **publish_params(tmp_path, job_id, tmp_path / "ckpt", world_size=2),
        "staging": str(tmp_path / "staging"),
    }
    publish(PublishRequest(job_id=job_id, attempt=1, **params), lambda: None)
    run_ranks(1, "load", tmp_path, program=RANKS)
    expected, found = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"after-{phase}").named_parameters())
        for phase in ("save", "load")
    )
    assert next(iter(found.values())).dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
