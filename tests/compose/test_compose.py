"""The whole service in containers, as `docker compose up` brings it up, and a client that trains
through it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_client import create_train_service_client
from nexrl_client.errors import NexRLError
from torch import Tensor

from tests.helpers.docker import IMAGE_TAG, ComposeStack, docker, require_engine
from tests.helpers.servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.docker, pytest.mark.timeout(1200)]

OWN_PARTS = {
    "gateway": "nexrl_gateway",
    "worker": "nexrl_worker",
    "checkpointer": "nexrl_checkpointer",
}
# Seconds within which `docker compose stop` must be through: the longest stop_grace_period, after
# which containers are killed.
GRACE_S = 70.0
KILLED = 137
ROWS, LENGTH, RESPONSE = 6, 12, 5


@dataclass(frozen=True)
class Trained:
    """What the client saw: its group's answers around one update of the weights."""

    batch: dict[str, Any]
    first: Tensor
    update: dict[str, Any]
    saved: dict[str, Any]
    synced: dict[str, Any]
    after: Tensor


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeStack]:
    """The images built and every service up, two workers and two checkpointers; nothing of it is
    left afterwards."""
    require_engine()
    stack = ComposeStack(tmp_path_factory.mktemp("compose-data"))
    stack.build()
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("down", "-v", "--timeout=10", timeout_s=120)


@pytest.fixture(scope="module")
def trained(stack: ComposeStack) -> Trained:
    """A group of two ranks that took one step, saved a checkpoint and wrote a weight-sync
    folder."""
    client = _client(stack)
    config = {"actor": {"model": {"path": _tiny_model(stack)}, "optim": {"lr": 1e-2}}}
    client.initialize_worker(config_dict=config, role="actor", world_size=2)
    client.init_model()
    batch = _batch()
    first = client.compute_log_prob(batch)["batch"]["old_log_probs"]
    batch["tensors"]["old_log_probs"] = first
    update = client.update_actor(batch)
    saved = client.save_checkpoint(local_path="ckpt/step_1", global_step=1)
    synced = client.save_checkpoint(local_path="sync", global_step=1, saved_fully_shared_ckpt=False)
    after = client.compute_log_prob(batch)["batch"]["old_log_probs"]
    return Trained(batch, first, update, saved, synced, after)


def _client(stack: ComposeStack) -> Any:
    return create_train_service_client(backend="self-hosted", url=stack.url, identifier="student")


def _tiny_model(stack: ComposeStack) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )
    folder = stack.data / "tiny"
    model.save_pretrained(folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, stack.uid, stack.gid)
    return str(folder)


def _batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 64, (ROWS, LENGTH), generator=draw)
    tensors = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(LENGTH).repeat(ROWS, 1),
        "responses": input_ids[:, -RESPONSE:],
        "advantages": torch.randn(ROWS, RESPONSE, generator=draw),
    }
    return {"tensors": tensors, "values": {}, "metadata": {"temperature": 1.0}}


def _log_probs(folder: Path, input_ids: Tensor) -> Tensor:
    """[B, R] of the model in ``folder``, computed here, as a rollout engine on this machine
    would."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        every = torch.log_softmax(model(input_ids).logits[:, :-1], dim=-1)
    chosen: Tensor = every.gather(-1, input_ids[:, 1:, None])[..., 0]
    return chosen[:, -RESPONSE:]


def test_each_service_runs_as_an_ordinary_user(stack: ComposeStack) -> None:
    """No container runs as root: its processes have the caller's user and group."""
    for container in stack.containers():
        ids = docker("exec", container["Id"], "sh", "-c", "id -u; id -g").split()
        assert ids == [str(stack.uid), str(stack.gid)], container["Name"]


def test_only_the_gateway_is_published_and_only_on_loopback(stack: ComposeStack) -> None:
    """From outside the machine nothing can be reached; on it, the gateway alone."""
    published = {
        (
            container["Config"]["Labels"]["com.docker.compose.service"],
            binding["HostIp"],
            binding["HostPort"],
        )
        for container in stack.containers()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    }
    assert published == {("gateway", "127.0.0.1", str(stack.port))}


@pytest.mark.parametrize("service", OWN_PARTS)
def test_an_image_carries_only_its_own_service(stack: ComposeStack, service: str) -> None:
    """Torch and transformers are in the worker's image alone, and no image holds another
    service."""
    foreign = {*OWN_PARTS.values(), "nexrl_stack", "nexrl_client"} - {OWN_PARTS[service]}
    foreign |= set() if service == "worker" else {"torch", "transformers"}
    look = (
        f"import importlib.util as u; print([m for m in {sorted(foreign)} if u.find_spec(m)], "
        f"bool(u.find_spec({OWN_PARTS[service]!r})))"
    )
    image = f"nexrl-{service}:{IMAGE_TAG}"

    assert docker("run", "--rm", "--network=none", image, "python", "-c", look).strip() == "[] True"


def test_every_replica_is_registered_under_its_own_name(stack: ComposeStack) -> None:
    """Two workers and two checkpointers offer themselves, and the workers' names do not depend on a
    container."""
    health = _client(stack).health_check()

    assert [agent["name"] for agent in health["agents"]] == ["worker-1", "worker-2"]
    assert len(health["checkpointers"]) == 2
    assert health["slots"]["total"] == 4


def test_a_client_trains_through_the_containers(stack: ComposeStack, trained: Trained) -> None:
    """One step on two ranks changes the weights, and the weight-sync folder on this machine holds
    exactly what the group computes with."""
    assert trained.first.shape == (ROWS, RESPONSE)
    assert trained.first.dtype == torch.float32
    assert trained.update["metrics"]["actor/grad_norm"] > 0
    assert not torch.allclose(trained.first, trained.after)
    torch.testing.assert_close(
        _log_probs(stack.data / "tiny", trained.batch["tensors"]["input_ids"]),
        trained.first,
        atol=1e-4,
        rtol=0,
    )
    torch.testing.assert_close(
        _log_probs(stack.data / "sync", trained.batch["tensors"]["input_ids"]),
        trained.after,
        atol=1e-4,
        rtol=0,
    )


def test_the_checkpoint_lies_where_the_answer_says(stack: ComposeStack, trained: Trained) -> None:
    """Paths mean the same in the containers and on this machine; a checkpointer has published the
    save."""
    path = Path(trained.saved["path"])
    assert path == stack.data / "ckpt" / "step_1"
    assert (path / "manifest.json").is_file()
    assert list(path.rglob("*.safetensors"))


def test_files_belong_to_the_caller(stack: ComposeStack, trained: Trained) -> None:
    """Everything the services wrote, Redis included, has the caller's user and group, so the caller
    can remove it."""
    written = [
        path for path in stack.data.rglob("*") if "tiny" not in path.relative_to(stack.data).parts
    ]
    owners = {
        (found.st_uid, found.st_gid) for path in written if (found := _lstat(path)) is not None
    }
    assert owners == {(stack.uid, stack.gid)}
    assert any((stack.data / ".nexrl" / "redis").rglob("*.aof"))


def _lstat(path: Path) -> os.stat_result | None:
    """None where the running services have removed it since it was listed."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def test_a_group_comes_back_with_its_weights(stack: ComposeStack, trained: Trained) -> None:
    """`stop` ends every process by itself within its grace, and after `down` and `up` on the same
    data the group goes on where it was."""
    started = time.monotonic()
    stack.compose("stop", timeout_s=2 * GRACE_S)
    assert time.monotonic() - started < GRACE_S
    ended = {each["Name"]: each["State"]["ExitCode"] for each in stack.containers()}
    assert KILLED not in ended.values(), f"exit codes {ended}"

    stack.compose("down", "-v", timeout_s=60)
    stack.up()

    client = _client(stack)
    wait_until(lambda: _state(client) == "ready", 180, "the group after the restart")
    again = client.compute_log_prob(trained.batch)["batch"]["old_log_probs"]
    torch.testing.assert_close(again, trained.after, atol=1e-6, rtol=0)
    assert client.update_actor(trained.batch)["metrics"]["actor/grad_norm"] > 0


def _state(client: Any) -> str:
    try:
        return str(client.get_models()["models"]["student"]["state"])
    except (NexRLError, KeyError) as error:
        return repr(error)


def test_down_leaves_nothing(stack: ComposeStack) -> None:
    """After `down -v` the engine holds no container, network or volume of the project; only the
    data folder stays."""
    stack.compose("down", "-v", timeout_s=2 * GRACE_S)

    assert stack.left() == {"containers": [], "networks": [], "volumes": []}
    assert os.path.isdir(stack.data / ".nexrl")
    stack.up()  # for the tests that come after it
