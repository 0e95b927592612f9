"""The frozen reference is probed itself: what holds for the group's own model need not hold for
it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_worker.training import Engine, InvalidValue
from nexrl_worker.training.model.weights import MemoryReader
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from tests.helpers.engines import SMALL, MemoryRows, batch, plain_scores, planned, save_model
from tests.helpers.rank_processes import run_ranks
from tests.helpers.ranks.reference import ready
from tests.helpers.single_rank import build, compute, update

pytestmark = pytest.mark.usefixtures("one_rank")


def granite(folder: Path, scaling: float, seed: int) -> str:
    torch.manual_seed(seed)
    GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=scaling)).save_pretrained(folder)  # type: ignore[arg-type]
    return str(folder)


def engine_of(path: str, reference: str | None, role: str = "actor", **changes: Any) -> Engine:
    return build(path, role, ref=Space(model=Space(path=reference)), **changes)


def scored(engine: Engine, operation: str, rows: MemoryRows) -> Tensor:
    (found,) = compute(engine, operation, rows).values()
    return found


def plain(path: str, rows: MemoryRows) -> Tensor:
    """Log-probabilities of the folder's model by transformers, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        return plain_scores(model, rows)[0]


def attended(values: Tensor, rows: MemoryRows) -> Tensor:
    """Those that both ways define: of attended labels with an attended token before them."""
    mask = rows.tensors["attention_mask"].bool()
    return values[(mask[:, 1:] & mask[:, :-1])[:, -values.shape[1] :]].double()


@pytest.mark.parametrize(("group", "reference"), [(1.0, 8.0), (8.0, 1.0)])
@pytest.mark.parametrize("packing", [False, True])
def test_another_logits_scaling(
    tmp_path: Path, group: float, reference: float, packing: bool
) -> None:
    """The reference gives the log-probabilities of its own plain model, whether only it scales its
    logits or the group."""
    own, other = granite(tmp_path / "own", group, 1), granite(tmp_path / "other", reference, 2)
    rows = batch()
    engine = engine_of(own, other, packing=packing)
    assert (
        engine.info()["chunked_log_probs"] is (group == 1.0) and engine.info()["packing"] is packing
    )

    found = scored(engine, "compute_ref_log_prob", rows)

    torch.testing.assert_close(
        attended(found, rows), attended(plain(other, rows), rows), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        attended(scored(engine, "compute_log_prob", rows), rows),
        attended(plain(own, rows), rows),
        atol=1e-5,
        rtol=0,
    )


def test_kl_is_measured_to_it(tmp_path: Path) -> None:
    """The KL term of an update without ref_log_prob is the one between the two plain models."""
    own, other = granite(tmp_path / "own", 1.0, 1), granite(tmp_path / "other", 8.0, 2)
    rows = batch()
    del rows.tensors["ref_log_prob"]
    engine = engine_of(own, other, use_kl_loss=True, kl_loss_type="k2")
    ready(engine, "update_actor", rows)

    found = update(engine, rows)[0].metrics["actor/kl_loss"]

    apart = plain(own, rows) - plain(other, rows)
    picked = rows.tensors["scoring_attention_mask"][:, -apart.shape[1] :].bool()
    assert found == pytest.approx(float((apart[picked].square() / 2).mean()), rel=1e-6)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Ranks examine it together and compute alike, packed too."""
    own, other = granite(tmp_path / "own", 1.0, 1), granite(tmp_path / "other", 8.0, 2)
    rows = batch()

    found = torch.tensor(run_ranks(2, "frozen", tmp_path, own, other, program="reference"))

    torch.testing.assert_close(
        attended(found, rows), attended(plain(other, rows), rows), atol=1e-5, rtol=0
    )


def test_one_that_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    """A group that packs refuses it every time with a way out and goes on; one that pads uses
    it."""
    own = save_model(tmp_path / "own", "llama")
    other = save_model(tmp_path / "other", "llama", attention_chunk_size=64)
    rows = batch()
    packed, padded = (engine_of(own, other, packing=packing) for packing in (True, False))
    prepared, plan = planned(packed, "compute_ref_log_prob", rows)

    ready(packed, "compute_ref_log_prob", rows)
    for _ in range(2):
        assert packed.frozen.ready
        with pytest.raises(InvalidValue, match=r"in chunks.*use_remove_padding false"):
            packed.check(prepared, plan)
    with pytest.raises(InvalidValue, match="packed rows"):
        packed.compute(prepared, plan)

    wanted = attended(plain(own, rows), rows)  # both folders hold the same weights
    for found in (
        scored(packed, "compute_log_prob", rows),
        scored(padded, "compute_ref_log_prob", rows),
    ):
        torch.testing.assert_close(attended(found, rows), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("role", ["ref", "teacher"])
def test_a_frozen_group_is_its_own_reference(tmp_path: Path, role: str) -> None:
    """No second model while its weights are the folder's; after a load the folder's are read
    again."""
    path, rows = save_model(tmp_path / "model"), batch()
    engine = engine_of(path, None, role)
    wanted = attended(plain(path, rows), rows)
    shared = scored(engine, "compute_ref_log_prob", rows)
    assert engine.frozen.model is None
    torch.testing.assert_close(attended(shared, rows), wanted, atol=1e-5, rtol=0)

    engine.state.load_shards(
        MemoryReader(
            {
                name: tensor * 0.5
                for name, tensor in engine.state.full_weights()
                if tensor is not None
            }
        )
    )
    engine.state.load_scalars(
        {"optimizer_steps": 0, "adamw_steps": 0, "weight_version": 0}
    )  # saved before any step

    assert engine.uses_reference(engine.prepare("compute_ref_log_prob", rows, {}))
    assert torch.equal(scored(engine, "compute_ref_log_prob", rows), shared)
    assert (scored(engine, "compute_log_prob", rows) - shared).abs().max() > 1e-2


def test_a_frozen_group_with_another_reference_reads_it(tmp_path: Path) -> None:
    """`ref.model.path` goes before the group's own weights."""
    own, other = granite(tmp_path / "own", 1.0, 1), granite(tmp_path / "other", 1.0, 2)
    rows = batch()

    found = scored(engine_of(own, other, "ref"), "compute_ref_log_prob", rows)

    torch.testing.assert_close(
        attended(found, rows), attended(plain(other, rows), rows), atol=1e-5, rtol=0
    )
