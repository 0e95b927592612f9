"""Options of a step that change its cost and not its result: gradient synchronisation, compilation,
the head's dtype."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_worker.training.batch.layout import Layout
from nexrl_worker.training.batch.micro_batch import BatchReader
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import forget_kept_back, synchronise
from nexrl_worker.training.model.build import Recipe, build_model, compile_layers, decoder_layers
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.observe.costs import Clock
from nexrl_worker.training.torch_parts import missing_compiler
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.helpers.engines import batch, config, save_model
from tests.helpers.rank_processes import run_ranks

CPU = torch.device("cpu")
RANKS = "packing"


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """L2 distance of two sets of gradients over the length of the wanted one."""
    apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return float((apart / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5)


def plain_gradients(path: str) -> dict[str, Tensor]:
    """Of the same loss, taken twice, by the model's own logits on each row without padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    rows = batch()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(rows.size):
        kept = rows.tensors["attention_mask"][row].bool()
        ids = rows.tensors["input_ids"][row][kept]
        logs = torch.log_softmax(
            model(input_ids=ids[None], use_cache=False).logits[0].double() / 0.7, dim=-1
        )
        scored = rows.tensors["scoring_attention_mask"][row].clone()
        scored[:6] = 0
        picked = scored[kept].bool()[1:]
        total = total + logs[:-1].gather(1, ids[1:, None])[:, 0][picked].square().sum()
    (2 * total).backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_kept_back_are_the_same(tmp_path: Path, world_size: int) -> None:
    """Synchronised at the last of three micro-batches, in two accumulations, packed or not: a plain
    loop's gradients."""
    path = save_model(tmp_path / "model")
    answer = run_ranks(world_size, "synchronisation", tmp_path, path, program=RANKS)
    wanted = plain_gradients(path)
    for name in ("each", "last", "packed", "after-error"):
        assert gap(load_file(str(tmp_path / f"{name}-{world_size}.safetensors")), wanted) <= 1e-9, (
            name
        )
    assert (answer["communication"]["each"] > 0.0) == (world_size > 1)


@pytest.mark.slow
def test_the_clock_shows_who_waits(tmp_path: Path) -> None:
    """A rank that waits 1.5 s for another in a collective reports it as communication, inside its
    forward.

    Or some of it: on a busy machine it is late itself.
    """
    answer = run_ranks(2, "waiting", tmp_path, save_model(tmp_path / "model"), program=RANKS)
    assert 1.0 < answer["communication"] <= answer["forward"] + answer["backward"]
    assert answer["forward"] > 1.0 and answer["backward"] > 0.0 and answer["step"] == 0.0


def test_clock_adds_up_and_forgets() -> None:
    """Blocks of one name add up, an exception does not lose its block; nothing counts before
    `start`, after `seconds`."""
    clock = Clock(CPU)
    with clock.measure("backward"):
        pass
    clock.start()
    for _ in range(2):
        with clock.measure("forward"):
            time.sleep(0.02)
    with pytest.raises(KeyError), clock.measure("step"):
        raise KeyError
    seconds = clock.seconds()
    assert seconds["forward"] >= 0.04 and seconds["step"] > 0.0 and seconds["backward"] == 0.0
    with clock.measure("forward"):
        pass
    assert set(clock.seconds().values()) == {0.0}


# -- one rank
# --------------------------------------------------------------------------------------------------


def build(path: str, **changes: Any) -> PolicyModel:
    actor = config(path, **changes)
    if "param" in changes:
        actor.fsdp_config.mixed_precision = Space(param_dtype=changes["param"], reduce_dtype=None)
    root = build_model(path, Recipe.of(actor, role_of("actor"), CPU))
    assert isinstance(root, PolicyModel)
    return root


def scored(
    root: PolicyModel, indices: list[int], packed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the rows, and the gradients of their sum of squares."""
    rows = batch()
    micro = BatchReader(
        rows, Layout.of(rows), (), CPU, torch.float64, packed, temperature=0.7
    ).read(indices)
    log_probs, _ = root.score(micro, entropy=False, all_labels=True)
    log_probs.square().sum().backward()
    found = {}
    for name, param in root.hf.named_parameters():
        assert param.grad is not None
        found[name], param.grad = param.grad.full_tensor().clone(), None
    return log_probs.detach(), found


@pytest.mark.usefixtures("one_rank")
def test_an_error_in_a_layer_leaves_nothing_gathered(tmp_path: Path) -> None:
    """After an error amid a forward and `forget_kept_back`, parameters are shards, and the next
    step is the same."""
    root = build(save_model(tmp_path))
    wanted, expected = scored(root, [0, 4])
    synchronise(root, False)
    hook = decoder_layers(root.hf)[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scored(root, [0, 4])
    hook.remove()
    forget_kept_back(root)
    assert all(isinstance(param, DTensor) for param in root.parameters())
    log_probs, grads = scored(root, [0, 4])
    assert torch.equal(log_probs, wanted) and gap(grads, expected) == 0.0


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("own_logits", [False, True])
def test_a_head_in_float32(tmp_path: Path, own_logits: bool) -> None:
    """With lm_head_dtype float32 the head's product keeps what bfloat16 logits lose: the scores are
    finer by far."""
    path = save_model(tmp_path)
    roots = {
        wide: build(path, dtype="float32", param="bfloat16", lm_head_dtype=wide)
        for wide in (None, "float32")
    }
    results = {}
    for wide, root in roots.items():
        hidden: list[Tensor] = []
        root.hf.base_model.register_forward_hook(
            lambda module, args, output, kept=hidden: kept.append(output.last_hidden_state.detach())
        )
        root.fallback = "asked for" if own_logits else None
        log_probs, grads = scored(root, [4])
        weight = root.hf.get_output_embeddings().weight.detach().full_tensor().bfloat16()
        logs = torch.log_softmax(hidden[0][0].double() @ weight.double().t() / 0.7, dim=-1)
        ids = batch().tensors["input_ids"][4]
        wanted = logs[5:13].gather(1, ids[6:, None])[:, 0]
        results[wide] = float((log_probs[0] - wanted).abs().max())
        assert all(
            torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads.values()
        )
    assert results["float32"] < 1e-4 < 1e-3 < results[None]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch's own, from the modules of its compiler
@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="torch.compile needs a C++ compiler")
@pytest.mark.usefixtures("one_rank")
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    """A compiled layer, recomputed in the backward, on streams of two lengths: the same names,
    scores and gradients.

    Not to 1e-9: compiled norms round the float32 in which this family computes them in another
    order.
    """
    path = save_model(tmp_path, num_hidden_layers=1)
    plain, root = build(path), build(path, compiled=True, recompute=True)
    assert [name for name, _ in root.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    for indices in ([0, 1, 4], [6, 2]):
        (log_probs, grads), (wanted, expected) = (
            scored(one, indices, packed=True) for one in (root, plain)
        )
        assert (log_probs - wanted).abs().max() <= 1e-5 and gap(grads, expected) <= 1e-5


def test_no_compiler_is_a_clear_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no compiler is found, the configuration key is named instead of a step failing
    later."""
    from torch._inductor import cpp_builder

    def none() -> str:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InvalidValue, match=r"use_torch_compile needs a C\+\+ compiler"):
        compile_layers(torch.nn.Module(), CPU)
    assert missing_compiler(CPU) is not None
