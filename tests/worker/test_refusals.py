"""What two ranks refuse, they refuse together: the job fails with the reason, no weight changes,
and the group goes on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_contract import names
from nexrl_contract.records import JobRecord
from nexrl_storage.manifest import Manifest, describe, staging_folder, write_manifest
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from tests.helpers.agent import Agents, save_model
from tests.helpers.records import new_job
from tests.helpers.servers import RedisServer, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny``; ``small``, which knows fewer tokens; ``short``, whose embedding lacks the last
    rows."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny")
    save_model(folder / "small", vocabulary=8)
    shutil.copytree(folder / "tiny", folder / "short")
    weights = load_file(folder / "short" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:40].clone()
    save_file(weights, folder / "short" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def agents(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, models: Path
) -> Iterator[Agents]:
    """An agent and its group of two ranks, whose reference knows too few tokens."""
    data = tmp_path_factory.mktemp("refusals") / "data"
    data.mkdir()
    agents = Agents(data, redis_server.url)
    agents.ledger.client.flushall()
    agents.start(redis_server.url)
    begin_group(agents, models)
    yield agents
    agents.stop(signal.SIGKILL)
    agents.ledger.client.close()


def begin_group(agents: Agents, models: Path) -> None:
    agents.ready(models / "tiny", world_size=2, ref={"model": {"path": str(models / "small")}})


def end_group(agents: Agents) -> None:
    agents.ended(agents.submit("destroy"))
    wait_until(lambda: agents.free() == 2, 20, "the slots")


@pytest.fixture
def without_group(agents: Agents, models: Path) -> Iterator[Agents]:
    """The agent while its group is away; afterwards the group of all tests is there again."""
    end_group(agents)
    yield agents
    if agents.free() < 2:
        end_group(agents)
    begin_group(agents, models)


def refused(agents: Agents, job: JobRecord, code: str) -> str:
    """The message of a job that failed so; the group has gone on with the weights that it had."""
    ended = agents.ended(job)
    assert ended.error is not None
    assert ended.error["code"] == code, ended.error
    assert agents.group().state == "ready"
    return str(ended.error["message"])


def test_a_message_that_is_longer_than_its_place_reaches_all_ranks(agents: Agents) -> None:
    """Rank 0 alone finds the path too long, and says so in characters that take six bytes each."""
    path = str(agents.data / ("\u4e2d" * 800))

    refused(
        agents,
        agents.submit("save_checkpoint", local_path=path, saved_fully_shared_ckpt=False),
        "PATH_REFUSED",
    )

    assert agents.fingerprint()


def test_a_result_that_cannot_be_stored_for_a_while_is_stored_later(agents: Agents) -> None:
    """The store's trouble is not the weights': the group must not go down with it."""
    job = new_job("compute_log_prob", identifier="student", queue=names.train_queue("student"))
    in_the_way = agents.data / ".nexrl" / "payloads" / f"{job.id}.result"
    in_the_way.mkdir(parents=True)
    agents.submit_batch("compute_log_prob", {"input_ids": torch.full((4, 6), 3)}, job)
    wait_until(
        lambda: "STORE_UNAVAILABLE" in (agents.logs() / "rank0.log").read_text(),
        20,
        "the store's refusal",
    )

    in_the_way.rmdir()

    assert agents.ended(job).state == "finished"


@pytest.mark.parametrize("where", ["header", "row 0", "last row"])
def test_a_bit_flipped_in_a_queued_batch_fails_its_job_on_all_ranks(
    agents: Agents, where: str
) -> None:
    """The header is read by both ranks, a row by one of them; the vote makes it everybody's
    refusal."""
    before = agents.fingerprint()
    ids = torch.full((512, 64), 3)
    tensors = {"input_ids": ids, "advantages": torch.ones(512)}

    def flip(path: Path) -> None:
        place = {"header": 20, "row 0": -ids.nbytes - 2048, "last row": -2049}[where]
        with path.open("r+b") as file:
            file.seek(place, 0 if place > 0 else 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    job = agents.submit_batch("update_actor", tensors, before_queued=flip)

    message = refused(agents, job, "PAYLOAD_DAMAGED")
    assert ("header" if where != "last row" else "tensor input_ids row 511") in message
    assert agents.fingerprint() == before


def test_a_reference_that_knows_too_few_tokens_is_refused(agents: Agents) -> None:
    """Its forward would fail on the ranks that have such a token, in the middle of a collective."""
    before = agents.fingerprint()

    job = agents.submit_batch("compute_ref_log_prob", {"input_ids": torch.full((4, 6), 63)})

    assert "8 tokens" in refused(agents, job, "INVALID_CONFIG")
    assert agents.fingerprint() == before


def test_a_checkpoint_whose_parts_lie_is_refused_before_any_weight_changes(agents: Agents) -> None:
    """Its hashes are right; what they protect is an index of other files, no random state, or no
    seed."""
    saved = agents.submit("save_checkpoint", local_path=str(agents.data / "unused"))
    wait_until(lambda: agents.ledger.require_job(saved.id).queue == names.CHECKPOINT_QUEUE, 20)
    agents.published(saved)
    before = agents.fingerprint()
    for spoil in (_mislead, _forget_random_state, _forget_steps):
        folder = agents.data / spoil.__name__
        shutil.copytree(staging_folder(agents.data, saved.id), folder)
        spoil(folder)
        _sign(folder)

        refused(agents, agents.submit("load_checkpoint", path=str(folder)), "CHECKPOINT_INVALID")
        assert agents.fingerprint() == before


def _mislead(folder: Path) -> None:
    def change(index: Any) -> None:
        index["tensors"]["model.norm.weight"]["file"] = "optim.rank1-of-2.safetensors"

    _edit(folder / "rank1-of-2.json", change)


def _forget_random_state(folder: Path) -> None:
    _edit(folder / "rank1-of-2.json", lambda index: index.update(rng={"torch": "none"}))


def _forget_steps(folder: Path) -> None:
    _edit(folder / "state.json", lambda state: state["scalars"].pop("adamw_steps"))


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _sign(folder: Path) -> None:
    files = tuple(
        describe(folder, str(path.relative_to(folder)))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    manifest = Manifest(
        identifier="student",
        job_id="j",
        step=0,
        seq=0,
        world_size=2,
        config_hash="",
        weight_only=False,
        created=0.0,
        files=files,
    )
    write_manifest(folder, manifest)


def test_a_family_that_cannot_be_run_is_refused_while_the_ranks_start(
    without_group: Agents, models: Path
) -> None:
    """The answer to initialize_worker says so; name and slots are free, and a group of that name
    starts."""
    agents = without_group
    (models / "bert").mkdir()
    BertConfig(vocab_size=64, hidden_size=16, num_attention_heads=2).save_pretrained(
        models / "bert"
    )
    shutil.copy(models / "tiny" / "model.safetensors", models / "bert")

    ended = agents.ended(agents.place(models / "bert"))

    assert ended.error is not None
    assert (ended.error["code"], ended.error["key"]) == ("INVALID_CONFIG", "actor.model.path"), (
        ended.error
    )
    assert "bert" in ended.error["message"] and "\n" not in ended.error["message"]
    assert (agents.group().state, agents.free(), agents.ranks()) == ("destroyed", 2, [])


def test_a_model_that_one_rank_cannot_read_is_refused_by_all(
    without_group: Agents, models: Path
) -> None:
    """The rows that the file lacks are the second rank's. The group can be destroyed like any
    other."""
    agents = without_group
    assert agents.ended(agents.place(models / "short", world_size=2)).state == "finished"

    ended = agents.ended(agents.submit("init_model"))

    assert ended.error is not None
    assert (ended.error["code"], ended.error["key"]) == ("INVALID_CONFIG", "actor.model.path")
    assert agents.group().state == "up"
    assert agents.ended(agents.submit("barrier")).state == "finished"
