"""Making, finding and ending groups through the gateway, with the test playing the agent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from nexrl_contract import names
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.records import ProcessRecord, Share
from nexrl_ledger import Ledger

from tests.helpers.gateway import ASYNC, Gateway, PlayedGroup, refusal
from tests.helpers.servers import wait_until

INITIALIZE = "/initialize?identifier=student"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that may be a model as far as the gateway looks."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def body(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "config_dict": {"actor": {"model": {"path": str(model)}, "optim": {"lr": 1e-3}}},
        "world_size": 2,
        **changes,
    }


def place(ledger: Ledger, identifier: str = "student") -> None:
    """What an agent does when the ranks are up."""
    job = wait_until(lambda: ledger.claim(names.AGENT_QUEUE), 5, "the placement job")
    epoch = ledger.groups.start_epoch(identifier, [Share(agent="agent", slots=1, host="here")])
    ledger.groups.update(identifier, epoch, state="up")
    ledger.finish(job, result={})


def test_initialize_makes_a_group_and_again_changes_nothing(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """The answer names what was ignored; equal settings answer already: true; others are 409 and
    name the keys."""
    wanted = body(model, zmq_base_port=5555)
    wanted["config_dict"]["actor"]["use_ring_sequence_parallel"] = True
    accepted = gateway.post(INITIALIZE, json=wanted, headers=ASYNC)
    assert accepted.status_code == 202
    place(ledger)
    first = gateway.get(f"{accepted.headers['Location']}/result?wait=5").json()
    assert first == {
        "status": "success",
        "identifier": "student",
        "job_id": accepted.json()["id"],
        "role": "actor",
        "world_size": 2,
        "ignored": ["actor.use_ring_sequence_parallel", "zmq_base_port"],
        "already": False,
    }
    assert gateway.post(INITIALIZE, json=wanted).json() == {**first, "already": True}
    other = body(model, world_size=1)
    other["config_dict"]["actor"]["optim"]["lr"] = 1e-4
    error = refusal(gateway.post(INITIALIZE, json=other), 409, "GROUP_EXISTS")
    assert error["keys"] == ["actor.optim.lr", "world_size"]
    group = ledger.groups.get("student")
    assert group is not None
    assert group.config["model"]["path"] == str(model)
    assert group.config["optim"]["lr"] == 1e-3


def test_a_whole_service_entry_needs_nothing_else(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """identifier, role and world size may stand in the entry; the client's role argument wins, and
    that is said."""
    entry = {
        "identifier": "entry",
        "role": "actor",
        "backend": "http",
        "url": "http://x",
        "resource": {"world_size": 3},
        "actor": {"model": {"path": str(model)}},
    }
    response = gateway.post(
        "/initialize", json={"config_dict": entry, "role": "teacher"}, headers=ASYNC
    )
    assert response.json()["identifier"] == "entry"
    group = ledger.groups.get("entry")
    assert group is not None
    assert (group.role, group.world_size, group.ignored) == ("teacher", 3, ["role"])
    entry |= {
        "identifier": "other",
        "role": "critic",
        "actor": entry["actor"] | {"entropy_coeff": 0.1},
    }
    gateway.post("/initialize", json={"config_dict": entry}, headers=ASYNC)
    group = ledger.groups.get("other")
    assert group is not None
    assert (group.role, group.ignored) == ("critic", ["actor.entropy_coeff"])


def test_the_ranks_share_a_micro_batch(gateway: Gateway, ledger: Ledger, model: Path) -> None:
    """What the group gets is its own share; to say the same share directly is the same group."""
    whole, own = body(model), body(model)
    whole["config_dict"]["actor"]["ppo_micro_batch_size"] = 9
    own["config_dict"]["actor"]["ppo_micro_batch_size_per_gpu"] = 4
    gateway.post(INITIALIZE, json=whole, headers=ASYNC)
    place(ledger)
    group = ledger.groups.get("student")
    assert group is not None
    assert group.config["ppo_micro_batch_size_per_gpu"] == 4
    assert gateway.post(INITIALIZE, json=own).json()["already"]


def test_a_repeated_key_is_the_same_group(gateway: Gateway, ledger: Ledger, model: Path) -> None:
    """A lost answer is given again, not turned into already: true."""
    headers = {**ASYNC, "Idempotency-Key": "make-it"}
    first = gateway.post(INITIALIZE, json=body(model), headers=headers).json()["id"]
    place(ledger)
    again = gateway.post(
        INITIALIZE, json=body(model), headers={"Idempotency-Key": "make-it"}
    ).json()
    assert (again["job_id"], again["already"]) == (first, False)
    refusal(
        gateway.post(INITIALIZE, json=body(model, world_size=1), headers=headers),
        409,
        "IDEMPOTENCY_MISMATCH",
    )


def test_a_group_that_must_wait_says_for_what(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """No free slots: a queued job that names them; impossible: 422; no agent at all: 503."""
    ledger.agents.beat(ProcessRecord(name="agent", slots=4, free=1))
    waiting = gateway.post(INITIALIZE, json=body(model), headers=ASYNC).json()
    assert waiting["state"] == "queued"
    assert "2 free slots" in waiting["waits_for"]
    error = refusal(
        gateway.post("/initialize?identifier=big", json=body(model, world_size=5)),
        422,
        "NO_SUCH_SLOTS",
    )
    assert error["slots"] == 4
    ledger.agents.sign_off("agent")
    refusal(gateway.post("/initialize?identifier=big", json=body(model)), 503, "GROUP_DOWN")
    assert gateway.get("/get_models").json()["identifiers"] == ["student"]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "no configuration": (lambda body: body.pop("config_dict"), "INVALID_ARGUMENT", "config_dict"),
    "a file for the client": (
        lambda body: body.update(config_path="x.yaml"),
        "INVALID_ARGUMENT",
        "config_path",
    ),
    "no world size": (lambda body: body.pop("world_size"), "INVALID_ARGUMENT", "world_size"),
    "no ranks": (lambda body: body.update(world_size=0), "INVALID_ARGUMENT", "world_size"),
    "an unknown argument": (lambda body: body.update(worldsize=1), "INVALID_ARGUMENT", "worldsize"),
    "an unknown role": (lambda body: body.update(role="gardener"), "INVALID_ARGUMENT", "role"),
    "an unknown role of the entry": (
        lambda body: body["config_dict"].update(role={"name": "actor"}),
        "INVALID_ARGUMENT",
        "role",
    ),
    "an unknown key": (
        lambda body: body["config_dict"]["actor"].update(clip_ration=1),
        "INVALID_CONFIG",
        "actor.clip_ration",
    ),
    "no model": (
        lambda body: body["config_dict"].update(actor={}),
        "INVALID_CONFIG",
        "actor.model",
    ),
    "no such folder": (
        lambda body: _path(body, "/nowhere/tiny"),
        "INVALID_CONFIG",
        "actor.model.path",
    ),
    "a variable": (lambda body: _path(body, "${HOME}/x"), "INVALID_CONFIG", "actor.model.path"),
    "a zero byte": (lambda body: _path(body, "a\0b"), "PATH_REFUSED", "actor.model.path"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_configuration_is_refused_by_key(
    name: str, gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """422 naming the key (and the nearest known one); no group, no job."""
    change, code, key = BAD[name]
    wanted = body(model)
    change(wanted)
    error = refusal(gateway.post(INITIALIZE, json=wanted), 422, code)
    assert error["key"] == key
    nearest = {"actor.clip_ration": "actor.clip_ratio", "worldsize": "world_size"}
    assert error.get("nearest") == nearest.get(key)
    assert gateway.get("/get_models").json()["count"] == 0
    assert gateway.get("/jobs").json() == {"jobs": []}


def test_an_identifier_is_needed_and_checked(gateway: Gateway, ledger: Ledger, model: Path) -> None:
    """A new group has a name of the documented form."""
    refusal(gateway.post("/initialize", json=body(model)), 400, "IDENTIFIER_REQUIRED")
    for name in ("a b", "../x", "x" * 64, "", "stu\n"):
        refusal(
            gateway.post("/initialize", params={"identifier": name}, json=body(model)),
            422,
            "INVALID_ARGUMENT",
        )


def test_destroy_of_a_group_that_waits_or_is_down_needs_no_ranks(
    gateway: Gateway, ledger: Ledger, model: Path, make_group: Callable[..., PlayedGroup]
) -> None:
    """The gateway ends it itself; its placement is withdrawn; afterwards the name is free again."""
    placement = gateway.post(INITIALIZE, json=body(model), headers=ASYNC).json()["id"]
    answer = gateway.post("/destroy?identifier=student")
    assert (answer.status_code, answer.json()["status"]) == (200, "success")
    refusal(gateway.get(f"/jobs/{placement}/result"), 409, "JOB_CANCELLED")
    assert ledger.claim(names.AGENT_QUEUE) is None
    refusal(gateway.post("/destroy?identifier=student"), 409, "GROUP_NOT_READY")
    assert gateway.post(INITIALIZE, json=body(model), headers=ASYNC).status_code == 202
    make_group("broken", state="down", cause="rank 1 was killed")
    assert gateway.post("/destroy?identifier=broken").status_code == 200
    assert gateway.get("/get_models").json()["identifiers"] == ["student"]


def test_destroy_of_a_living_group_is_its_own_job(gateway: Gateway, group: PlayedGroup) -> None:
    """The ranks run it, after what was queued before."""
    gateway.post("/barrier", headers=ASYNC)
    job_id = gateway.post("/destroy", headers=ASYNC).json()["id"]
    assert group.run_next(result={}).operation == "barrier"
    job = wait_until(group.claim, 5, "the job")
    assert job.id == job_id
    group.ledger.groups.mark_destroyed("student", 1)
    group.end(job, {})
    assert gateway.get(f"/jobs/{job_id}/result").json()["status"] == "success"


def test_cancelling_a_placement_frees_the_name(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """No group is left that nobody will ever place."""
    job_id = gateway.post(INITIALIZE, json=body(model), headers=ASYNC).json()["id"]
    assert gateway.call("DELETE", f"/jobs/{job_id}").json()["state"] == "cancelled"
    assert gateway.get("/get_models").json()["count"] == 0


def test_cancelling_an_old_placement_again_leaves_the_next_group_of_that_name_alone(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """A DELETE that is sent twice is harmless, also when the name is in use again."""
    job_id = gateway.post(INITIALIZE, json=body(model), headers=ASYNC).json()["id"]
    gateway.call("DELETE", f"/jobs/{job_id}")
    gateway.post(INITIALIZE, json=body(model), headers=ASYNC)

    assert gateway.call("DELETE", f"/jobs/{job_id}").json()["state"] == "cancelled"
    assert gateway.get("/get_models").json()["identifiers"] == ["student"]


def test_a_model_path_that_no_file_system_takes_is_refused_by_its_key(
    gateway: Gateway, ledger: Ledger, model: Path
) -> None:
    """A name of more than 255 bytes is a 422 like any other folder that is not there."""
    refusal(gateway.post(INITIALIZE, json=body(model / ("x" * 300))), 422, "INVALID_CONFIG")


def test_a_down_group_is_not_already_there(gateway: Gateway, ledger: Ledger, model: Path) -> None:
    """Equal settings of a group that is down: 503 with the cause, never success."""
    gateway.post(INITIALIZE, json=body(model), headers=ASYNC)
    place(ledger)
    ledger.groups.mark_down("student", 1, "rank 0 was killed")
    assert (
        refusal(gateway.post(INITIALIZE, json=body(model)), 503, "GROUP_DOWN")["cause"]
        == "rank 0 was killed"
    )


def test_what_is_shown_of_groups_is_true(
    gateway: Gateway, group: PlayedGroup, make_group: Callable[..., PlayedGroup], ledger: Ledger
) -> None:
    """/health, /get_models and /worker_info show states, heartbeats and slots; /metrics has the
    queues."""
    report = gateway.get("/health")
    assert (report.status_code, report.json()["status"]) == (200, "healthy")
    assert report.json()["slots"] == {"total": 4, "free": 4}
    assert report.json()["groups"]["student"]["last_heartbeat"] > 0
    gateway.post("/barrier", headers=ASYNC)
    assert 'nexrl_jobs{queue="student",state="queued"} 1' in gateway.get("/metrics").text
    info = gateway.get("/worker_info").json()
    assert (info["identifier"], info["state"], info["world_size"], info["role"]) == (
        "student",
        "ready",
        1,
        "actor",
    )
    make_group("broken", state="down", cause="rank 1 was killed")
    models = gateway.get("/get_models").json()
    assert (models["count"], models["models"]["broken"]["cause"]) == (2, "rank 1 was killed")
    assert gateway.get("/health").json()["status"] == "degraded"
    refusal(gateway.get("/worker_info"), 400, "IDENTIFIER_REQUIRED")
    assert gateway.get("/ready").json() == {
        "ready": True,
        "redis": "ok",
        "payload_store": "ok",
        "reasons": ["group broken is down: rank 1 was killed"],
    }


def test_every_example_of_the_docs_works(
    gateway: Gateway, group: PlayedGroup, make_group: Callable[..., PlayedGroup], model: Path
) -> None:
    """Each request body that /docs shows is accepted as it stands (the model's path apart)."""
    spec = gateway.get("/openapi.json").json()
    for role in ("critic", "reward"):
        make_group(role, role=role)
    sent = 0
    for path, methods in spec["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for name, example in content.get("application/json", {}).get("examples", {}).items():
            if name == "parts":
                continue  # its parts would have to be uploaded first
            value = json.loads(json.dumps(example["value"]).replace("/models/tiny", str(model)))
            roles = OPERATIONS[path[1:]].roles if path != "/initialize" else ()
            named = "new" if path == "/initialize" else "student" if "actor" in roles else roles[0]
            response = gateway.post(f"{path}?identifier={named}", json=value, headers=ASYNC)
            assert response.status_code == 202, (path, response.text)
            sent += 1
    assert sent == 16
    for methods in spec["paths"].values():
        for operation in methods.values():
            assert operation["tags"]
            assert operation["summary"]
            assert "503" in operation["responses"] or operation["tags"] == ["health"]


def test_the_docs_page_is_there(gateway: Gateway) -> None:
    """/docs for people."""
    assert requests.get(f"{gateway.url}/docs", timeout=10).status_code == 200


def _path(body: dict[str, Any], path: str) -> None:
    body["config_dict"]["actor"]["model"]["path"] = path
