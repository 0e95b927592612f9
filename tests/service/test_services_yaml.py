"""One YAML with several services: each becomes a group with its own role and settings, by its
name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nexrl_client import InvalidConfig, create_train_service_clients, load_service_config

from tests.helpers.service import make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVICE = """\
trainer: {{steps: 10, folder: "${{somewhere.else}}"}}
service:
  train_service:
    main_actor:
      backend: self-hosted
      url: {url}
      identifier: yaml-student
      role: actor
      resource: {{world_size: 1}}
      actor:
        model: {{path: {model}}}
        optim: {{lr: 2e-6}}
        policy_loss: cispo
    main_critic:
      backend: http
      url: {url}
      identifier: yaml-critic
      role: critic
      resource: {{world_size: 1}}
      actor: {{model: {{path: {model}}}, optim: {{lr: 1e-3}}}}
"""


def _file(folder: Path, stack: Stack, model: Path) -> Path:
    path = folder / "service.yaml"
    path.write_text(SERVICE.format(url=stack.url, model=model), encoding="utf-8")
    return path


def test_every_entry_becomes_a_group_of_its_role(
    stack: Stack, tiny_model: Path, tmp_path: Path
) -> None:
    """By name and by role; learning rates of 2e-6 are numbers; what belongs to the trainer is not
    looked at."""
    with create_train_service_clients(
        load_service_config(_file(tmp_path, stack, tiny_model))
    ) as clients:
        try:
            for client in clients.values():
                client.initialize_worker()
                client.init_model()
            batch = make_batch()
            batch["tensors"]["returns"] = torch.ones(5, 6)

            update = clients["main_actor"].update_actor(batch)["metrics"]
            values = clients.by_role("critic").compute_values(batch)["batch"]["values"]
            critic = clients["main_critic"].update_critic(batch)["metrics"]
            roles = {
                name: entry["role"]
                for name, entry in clients["main_actor"].get_models()["models"].items()
            }

            assert clients.by_role("actor") is clients["main_actor"]
            assert {name: roles[name] for name in ("yaml-student", "yaml-critic")} == {
                "yaml-student": "actor",
                "yaml-critic": "critic",
            }
            assert update["actor/lr"] == 2e-6
            assert torch.equal(values, torch.zeros(5, 6))
            assert critic["critic/lr"] == 1e-3
            assert critic["critic/vf_loss"] == pytest.approx(0.5)
        finally:
            for client in clients.values():
                client.destroy()


def test_one_file_serves_clients_made_one_by_one(
    stack: Stack, tiny_model: Path, tmp_path: Path
) -> None:
    """config_path of the whole file: the entry of the client's identifier is taken; a bad key names
    its place."""
    config = load_service_config(_file(tmp_path, stack, tiny_model))
    config["main_actor"]["actor"]["optim"]["learning_rate"] = 1.0
    with create_train_service_clients(config) as clients:
        with pytest.raises(InvalidConfig, match="learning_rate") as caught:
            clients["main_actor"].initialize_worker()
        assert "yaml-student" not in clients["main_actor"].get_models()["identifiers"]
    assert caught.value.status == 422
