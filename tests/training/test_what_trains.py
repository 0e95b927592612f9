"""The model says what of it trains, what is frozen and what is exported; everybody else asks it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from nexrl_worker import training
from nexrl_worker.training import Engine
from nexrl_worker.training.model.build import Recipe, build_model
from nexrl_worker.training.model.probe import Probe
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.observe.footprint import Sizes, make_room

from tests.helpers.engines import batch, config, save_model
from tests.helpers.single_rank import CPU, update

# Who wraps, builds, shards, tries out or converts a model looks at modules; the rest asks.
LOOKS = {
    *("wrapper.py", "build.py", "fsdp2.py", "probe.py", "weight_sources.py", "conversion.py"),
    "value_head.py",
}


def frozen_below(path: str) -> tuple[Engine, ModelWrapper]:
    """An actor of which the second layer alone trains."""
    actor = config(path, dtype="float32")
    recipe = Recipe.of(actor, role_of("actor"), CPU)
    model = build_model(path, recipe)
    for name, param in model.hf.named_parameters():
        param.requires_grad_("layers.1." in name)
    room = make_room(model, actor, False, recipe)
    return Engine(actor, recipe, model, Probe(0.0, None), {}, room), model


@pytest.mark.usefixtures("one_rank")
def test_what_is_frozen_is_saved_and_exported_and_never_stepped(tmp_path: Path) -> None:
    engine, model = frozen_below(save_model(tmp_path))
    trains, before = set(model.named_trainable()), engine.state.fingerprint()
    weights = {part.name: part.local_tensor.clone() for part in model.exported()}
    assert trains and {part.name for part in model.frozen_state()} == weights.keys() - trains
    update(engine, batch())
    changed = {
        part.name
        for part in model.exported()
        if not torch.equal(part.local_tensor, weights[part.name])
    }
    assert changed == trains and engine.state.fingerprint() != before
    moments = {part.name for part in engine.state.shards() if part.name.startswith("optim.")}
    assert moments == {
        f"optim.{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trains
    }
    assert {name for name, _ in engine.state.full_weights()} == weights.keys()
    sizes = Sizes.of(model)
    assert sizes.trained == 4 * sum(weights[name].numel() for name in trains) < sizes.own


def test_nobody_else_walks_the_models_parameters() -> None:
    """An adapter then touches the recipe and the wrapper alone."""
    files = [
        path for path in Path(training.__file__).parent.rglob("*.py") if path.name not in LOOKS
    ]
    walks = re.compile(
        r"\.hf\.named_parameters\(|named_buffers\(|persistent_buffers|parameter_shards"
    )
    assert [path.name for path in files if walks.search(path.read_text())] == []
