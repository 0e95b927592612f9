"""The real engine resumes from a checkpoint at another world size as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nexrl_checkpointer.publish import publish
from nexrl_checkpointer.request import PublishRequest
from nexrl_contract.names import new_job_id
from nexrl_contract.processes import die_with_parent
from support import save_model
from toy_checkpoints import environment, publish_params
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def run_ranks(phase: str, world_size: int, folder: Path) -> None:
    (folder / f"after-{phase}").mkdir()
    paths = os.pathsep.join([str(HERE.parent / "training"), os.environ.get("PYTHONPATH", "")])
    settings = environment(PYTHONPATH=paths, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    program = [sys.executable, str(HERE / "engine_ranks.py"), phase]
    ranks = [
        subprocess.Popen(
            [*program, str(rank), str(world_size), str(folder / f"meeting-{phase}"), str(folder)],
            env=settings,
            preexec_fn=die_with_parent,
        )
        for rank in range(world_size)
    ]
    try:
        assert [rank.wait(200) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_save_and_one_goes_on_where_they_were(tmp_path: Path) -> None:
    """Weights, both moments and the step count come back: the next update gives what it gives without the interruption."""
    save_model(tmp_path / "model")
    job_id = new_job_id()
    (tmp_path / "staging").mkdir()
    run_ranks("save", 2, tmp_path)
    params = {**publish_params(tmp_path, job_id, tmp_path / "ckpt", world_size=2), "staging": str(tmp_path / "staging")}
    publish(PublishRequest(job_id=job_id, attempt=1, **params), lambda: None)
    run_ranks("load", 1, tmp_path)
    expected, found = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"after-{phase}").named_parameters())
        for phase in ("save", "load")
    )
    assert next(iter(found.values())).dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
