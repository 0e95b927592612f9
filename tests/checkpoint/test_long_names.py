"""The longest name that the gateway lets through has room beside it for every hidden name; a longer
one is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from nexrl_checkpointer.publish import publish
from nexrl_checkpointer.retention import replace_previous
from nexrl_contract.names import group_key
from nexrl_contract.records import GroupRecord
from nexrl_gateway.paths import LONGEST_NAME
from nexrl_ledger import Ledger, connect
from nexrl_storage import local as durable
from nexrl_storage.manifest import Export, write_manifest
from nexrl_storage.publish import Replacement, Versions
from nexrl_worker.rank.control_group import ControlGroup, Refused

from tests.helpers.toy_checkpoints import loads, make_request, make_state

IDENTIFIER = "i" * 63


@pytest.mark.parametrize("swaps", [True, False], ids=["one-step", "two-renames"])
def test_a_sharded_save_of_the_longest_name(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """Published, replaced at a late attempt, and removed as the previous one."""
    if not swaps:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    ledger = Ledger(connect(redis_url))
    ledger.client.hset(
        group_key(IDENTIFIER), mapping=GroupRecord(identifier=IDENTIFIER, state="ready").to_hash()
    )
    long, short = tmp_path / ("n" * LONGEST_NAME), tmp_path / "short"
    for path in (long, long, short):
        request = make_request(
            tmp_path, path, make_state(), identifier=IDENTIFIER, remove_previous=True
        )
        publish(request.model_copy(update={"attempt": 1000}), lambda: None)
        replace_previous(ledger, request, time.time())
    assert loads(short, make_state()) and not list(tmp_path.glob("*nnn*"))


@pytest.mark.parametrize("ending", ["", "-hf"], ids=["weight-sync", "conversion"])
def test_a_hugging_face_save_of_the_longest_name(tmp_path: Path, ending: str) -> None:
    """With the longest identifier, version after version."""
    path = tmp_path / ("n" * LONGEST_NAME + ending)
    target = Replacement(path, IDENTIFIER, Export) if ending else Versions(path, IDENTIFIER)
    for version in range(12):
        target.check()
        fields = {
            "identifier": IDENTIFIER,
            "step": 0,
            "created": 0.0,
            "files": (),
            "weight_version": version,
        }
        write_manifest(target.begin(), Export.model_validate(fields))
        target.commit()
    assert f'"weight_version": {11}' in (path / "nexrl.json").read_text()


def test_a_name_too_long_found_by_a_rank_is_the_callers_error(tmp_path: Path) -> None:
    """Wherever in an operation: 422 with the path and the way out, and the group goes on."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        control = ControlGroup()
        with pytest.raises(
            Refused, match=r"/n+: File name too long; choose a shorter path"
        ) as refused:
            control.vote((tmp_path / ("n" * 300)).mkdir)
        assert (refused.value.code, refused.value.kind.status, control.vote(lambda: 7)) == (
            "PATH_REFUSED",
            422,
            7,
        )
    finally:
        dist.destroy_process_group()
