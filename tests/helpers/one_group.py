"""One group of one rank in this process: its engine and its checkpoints, without a runtime around
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nexrl_checkpointer.publish import PublishRequest, publish
from nexrl_contract.names import new_job_id
from nexrl_worker.checkpoint.manager import CheckpointManager
from nexrl_worker.checkpoint.shards import OPTIMIZER_PREFIX
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.settings import RankSettings
from nexrl_worker.training import Engine

from tests.helpers.engines import batch, config, planned


class Group:
    """One group's engine and its checkpoints, without a runtime around them."""

    def __init__(self, folder: Path, role: str, path: str, **changes: Any) -> None:
        actor = config(path, **{"dtype": "float32", **changes})
        settings = RankSettings(role, 1, role, {}, 0, 1, "", folder, "", False, False, 0)
        self.engine = Engine.build(actor, role, torch.device("cpu"))
        self.checkpoints = CheckpointManager(settings, actor, ControlGroup())

    def learn(self) -> None:
        """One optimizer step, so that moments and schedule are not those of a new group."""
        rows = batch()
        rows.tensors["returns"] = rows.tensors["advantages"]
        operation = "update_critic" if self.engine.info()["role"] == "critic" else "update_actor"
        self.engine.update(*planned(self.engine, operation, rows))

    def save(self, path: Path, *, sharded: bool, weight_only: bool = False) -> Path:
        params = {
            "global_step": 1,
            "local_path": str(path),
            "saved_fully_shared_ckpt": sharded,
            "save_weight_only": weight_only,
            "remove_previous_ckpt": False,
        }
        job_id = new_job_id()
        outcome = self.checkpoints.save(self.engine.state, job_id, params, 1)
        if outcome.publish is not None:
            request = {"identifier": "group", "seq": 1, **outcome.publish}
            publish(PublishRequest(job_id=job_id, attempt=1, **request), lambda: None)
        return path

    def load(self, path: Path, *, weight_only: bool = False) -> dict[str, Any]:
        return self.checkpoints.load(
            self.engine.state, {"path": str(path), "load_weight_only": weight_only}
        ).result

    def convert(self, path: Path) -> Path:
        """Of the current weights, where nothing is there; else of the checkpoint there."""
        return Path(
            self.checkpoints.convert(self.engine.state, {"local_path": str(path)}).result["path"]
        )

    def state(self) -> tuple[Any, ...]:
        """Weights, moments and schedule."""
        return self.engine.state.fingerprint(), self.moments(), self.engine.state.scalars()

    def moments(self) -> dict[str, float]:
        """A sum for each of AdamW's."""
        parts = (
            part for part in self.engine.state.shards() if part.name.startswith(OPTIMIZER_PREFIX)
        )
        return {part.name: part.local_tensor.sum().item() for part in parts}
