"""Large batches in parts: what was uploaded and what the verb says are one batch, and one job."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import xxhash
from nexrl_contract import names
from nexrl_contract.envelope import FRAME_METADATA_KEY
from nexrl_contract.records import JobRecord
from nexrl_ledger import Ledger
from tensor_codec import encode

from tests.helpers.gateway import (
    ASYNC,
    PAYLOAD,
    B,
    Gateway,
    PlayedGroup,
    frame,
    put_parts,
    refusal,
    tensors,
)
from tests.helpers.servers import wait_until

UPDATE = "/update_actor?identifier=student"


def test_parts_become_one_batch(gateway: Gateway, group: PlayedGroup) -> None:
    """Parts in any order, seen by GET, are one payload and one job; its arguments may stand in the
    verb."""
    whole = frame()
    refusal(gateway.get(f"/payloads/{PAYLOAD}"), 404, "PAYLOAD_NOT_FOUND")
    count = put_parts(gateway, whole, 300)
    seen = gateway.get(f"/payloads/{PAYLOAD}").json()
    assert seen == {"payload": PAYLOAD, "parts": list(range(count)), "nbytes": len(whole)}
    body = {"payload": PAYLOAD, "parts": count, "loss": "ppo"}
    assert gateway.post("/forward_backward", json=body, headers=ASYNC).status_code == 202
    job = wait_until(group.claim, 5, "the job")
    assert (job.rows, job.params) == (B, {"loss": "ppo", "explain": False})
    assert job.payload is not None
    assert group.store.open(job.payload.id).nbytes == len(whole)
    np.testing.assert_array_equal(
        group.store.open(job.payload.id).torch("input_ids").numpy(), tensors()["input_ids"]
    )
    group.end(job, {})
    assert gateway.stored() == []


def test_a_verb_over_parts_can_be_repeated(gateway: Gateway, group: PlayedGroup) -> None:
    """With a key, also after the job has ended and its batch is gone; a missing part is named and
    the others stay."""
    whole = frame()
    count = put_parts(gateway, whole, 300)
    body, key = {"payload": PAYLOAD, "parts": count + 1}, {**ASYNC, "Idempotency-Key": "parts-1"}
    assert refusal(gateway.post(UPDATE, json=body, headers=key), 422, "INVALID_ARGUMENT")[
        "missing"
    ] == [count]
    body["parts"] = count
    first = gateway.post(UPDATE, json=body, headers=key).json()["id"]
    group.run_next(result={})
    assert gateway.stored() == []
    again = gateway.post(UPDATE, json=body, headers={"Idempotency-Key": "parts-1"})
    assert again.json()["meta_info"]["job_id"] == first
    refusal(
        gateway.post(UPDATE, json={**body, "parts": 1}, headers=key), 409, "IDEMPOTENCY_MISMATCH"
    )


def test_a_payloads_id_is_all_of_its_name(gateway: Gateway) -> None:
    """A newline behind the 32 digits makes it another name, which is none."""
    right = {names.CHECKSUM_HEADER: xxhash.xxh3_128_hexdigest(b"x")}
    refusal(
        gateway.call("PUT", f"/payloads/{PAYLOAD}%0A/parts/0", data=b"x", headers=right),
        422,
        "INVALID_ARGUMENT",
    )
    assert gateway.stored() == []


def test_a_damaged_part_is_refused(gateway: Gateway, group: PlayedGroup) -> None:
    """The checksum must be there and be right; nothing stays of a damaged part."""
    path = f"/payloads/{PAYLOAD}/parts/0"
    wrong = {names.CHECKSUM_HEADER: xxhash.xxh3_128_hexdigest(b"other")}
    assert refusal(
        gateway.call("PUT", path, data=b"bytes", headers=wrong), 422, "CHECKSUM_MISMATCH"
    )["retryable"]
    refusal(gateway.call("PUT", path, data=b"bytes"), 422, "INVALID_ARGUMENT")
    refusal(
        gateway.call("PUT", "/payloads/nothex/parts/0", data=b"x", headers=wrong),
        422,
        "INVALID_ARGUMENT",
    )
    refusal(gateway.get(f"/payloads/{PAYLOAD}"), 404, "PAYLOAD_NOT_FOUND")


def read_by_the_ranks(group: PlayedGroup, job: JobRecord) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata that the ranks find in the job's batch, after checking its tensors, and all that
    is in the header."""
    assert job.payload is not None
    assert job.payload.checksum is not None
    with group.store.open(job.payload.id, job.payload.checksum) as payload:
        assert payload.nbytes == job.payload.nbytes
        for name, value in tensors().items():
            np.testing.assert_array_equal(payload.torch(name).numpy(), value)
        header = payload.header.metadata
    return json.loads(header[FRAME_METADATA_KEY])["metadata"], header


@pytest.mark.parametrize("spelling", ["metadata", "meta_info"])
def test_metadata_beside_parts_reaches_the_ranks(
    spelling: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """A plain safetensors file in parts computes at the verb's temperature, as inline tensors do;
    nothing is left over."""
    count = put_parts(gateway, encode(tensors(), {"format": "np"}).tobytes(), 300)
    body = {
        "payload": PAYLOAD,
        "parts": count,
        spelling: {"temperature": 0.25, "entropy_coeff": 0.1},
    }
    assert gateway.post(UPDATE, json=body, headers=ASYNC).status_code == 202
    job = wait_until(group.claim, 5, "the job")
    metadata, header = read_by_the_ranks(group, job)
    assert metadata == {"temperature": 0.25, "entropy_coeff": 0.1}
    assert header["format"] == "np"
    assert job.ignored == ["entropy_coeff"]
    group.end(job, {})
    assert gateway.stored() == []


def test_the_verbs_metadata_wins_over_the_frames(gateway: Gateway, group: PlayedGroup) -> None:
    """Key by key, as arguments do; what only the frame says stays, and equal metadata needs no
    second copy."""
    whole = frame(metadata={"temperature": 1.0, "global_step": 3})
    body = {
        "payload": PAYLOAD,
        "parts": put_parts(gateway, whole, 300),
        "metadata": {"temperature": 0.25},
    }
    gateway.post(UPDATE, json=body, headers=ASYNC)
    job = wait_until(group.claim, 5, "the job")
    assert read_by_the_ranks(group, job)[0] == {"temperature": 0.25, "global_step": 3}
    group.end(job, {})
    body["metadata"] = {"temperature": 1.0}
    put_parts(gateway, whole, 300)
    gateway.post(UPDATE, json=body, headers=ASYNC)
    job = wait_until(group.claim, 5, "the job")
    assert job.payload is not None
    assert job.payload.id == PAYLOAD


def test_metadata_beside_parts_is_part_of_the_content(gateway: Gateway, group: PlayedGroup) -> None:
    """The same key with the same metadata is the first job, with other metadata it is refused."""
    count = put_parts(gateway, encode(tensors()).tobytes(), 300)
    body = {"payload": PAYLOAD, "parts": count, "metadata": {"temperature": 0.25}}
    key = {**ASYNC, "Idempotency-Key": "parts-2"}
    first = gateway.post(UPDATE, json=body, headers=key).json()["id"]
    assert gateway.post(UPDATE, json=body, headers=key).json()["id"] == first
    body["metadata"] = {"temperature": 0.5}
    refusal(gateway.post(UPDATE, json=body, headers=key), 409, "IDEMPOTENCY_MISMATCH")
    assert gateway.stored() == [first]


def test_a_refused_verb_keeps_the_parts(gateway: Gateway, group: PlayedGroup) -> None:
    """The upload stays for the corrected request."""
    whole = encode(tensors()).tobytes()
    body = {
        "payload": PAYLOAD,
        "parts": put_parts(gateway, whole, 300),
        "metadata": {"temperature": 0.25},
    }
    refusal(gateway.post(UPDATE, json={**body, "los": "ppo"}), 422, "INVALID_ARGUMENT")
    group.ledger.client.hset(names.group_key("student"), "state", "up")
    refusal(gateway.post(UPDATE, json=body), 409, "GROUP_NOT_READY")
    assert gateway.get(f"/payloads/{PAYLOAD}").json()["nbytes"] == len(whole)
    group.ledger.client.hset(names.group_key("student"), "state", "ready")
    assert gateway.post(UPDATE, json=body, headers=ASYNC).status_code == 202


def test_a_verb_that_is_repeated_while_its_first_attempt_copies_the_parts_is_that_attempts_job(
    tmp_path: Path, redis_url: str, ledger: Ledger
) -> None:
    """A client whose connection was lost asks again at once; the first attempt takes the parts
    under the second one's eyes."""
    gateway = Gateway(tmp_path, redis_url, NEXRL_PAYLOADS=redis_url)
    PlayedGroup(ledger, gateway.payloads)
    shape = (64, 65536)
    large = tensors(
        input_ids=np.zeros(shape, np.int64),
        attention_mask=np.ones(shape, np.int64),
        advantages=np.ones(64, np.float32),
    )
    large = {
        name: value
        for name, value in large.items()
        if name in ("input_ids", "attention_mask", "advantages")
    }
    count = put_parts(gateway, encode(large).tobytes(), 32 * 1024**2)
    body = {"payload": PAYLOAD, "parts": count, "metadata": {"temperature": 0.25}}

    def attempt(delay_s: float) -> requests.Response:
        time.sleep(delay_s)
        return gateway.post(UPDATE, json=body, headers={**ASYNC, "Idempotency-Key": "parts-3"})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(attempt, (0.0, 0.02, 0.05, 0.1)))

    assert [answer.status_code for answer in answers] == [202] * 4, [
        answer.text for answer in answers
    ]
    assert len({answer.json()["id"] for answer in answers}) == 1
    gateway.stop()
