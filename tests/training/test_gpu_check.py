"""`scripts/gpu_check.py` in its CPU mode, without the packages that a GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_contract.sections import ActorConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ABSENT = (
    "fastapi",
    "uvicorn",
    "requests",
    "redis",
    "rq",
    "xxhash",
    "nexrl_client",
    "nexrl_ledger",
    "nexrl_payloads",
)


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a whole run wrote: the JSON, and the page under `page`."""
    folder = tmp_path_factory.mktemp("gpu-check")
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r}));"
        f"sys.argv = ['gpu_check.py', '--small', '--out', {str(folder)!r}]; sys.path.insert(0, "
        f"{str(SCRIPTS)!r});"
        f"runpy.run_path({str(SCRIPTS / 'gpu_check.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())
    return {**found, "page": (folder / "gpu-check.md").read_text()}


@pytest.mark.slow
def test_every_part_answers(report: dict[str, Any]) -> None:
    """Parity holds in float32 and is visibly worse in bfloat16; all sides take the same step;
    packing packs."""
    parts = report["parts"]
    assert list(parts) == ["parity", "full", "padded", "eight_layers"] and all(
        part["ok"] for part in parts.values()
    )
    ways = parts["parity"]["result"]["ways"]
    assert max(ways["CPU"].values()) <= 1e-5 < ways["CPU, bfloat16"]["gradients"]
    assert max(ways["CPU, packed"].values()) <= 1e-5
    for name in ("full", "padded", "eight_layers"):
        sides = parts[name]["result"]["sides"]
        norms = [side["gradient_norm"] for side in sides.values()]
        assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-4)
        assert all(
            side["tokens_per_s"] > 0 and side["peak_mib"] >= side["held_mib"] > 0
            for side in sides.values()
        )
    packed = parts["padded"]["result"]["sides"]["engine, packed"]
    assert packed["told"]["packing"] and packed["parts_s"]["time/forward_s"] > 0
    assert parts["padded"]["result"]["padding_share"] == pytest.approx(0.4, abs=0.02)
    told = {name: side["told"] for name, side in parts["eight_layers"]["result"]["sides"].items()}
    assert (
        told["engine"]["chunked_log_probs"]
        and not told["engine, whole logits"]["chunked_log_probs"]
    )


@pytest.mark.slow
def test_the_page_says_what_was_measured(report: dict[str, Any]) -> None:
    """The page names the machine and has every side of every part."""
    page = report["page"]
    assert (
        torch.__version__ in page and report["machine"]["date"] in page and "**failed**" not in page
    )
    for part in report["parts"].values():
        assert f"## {part['title']}\n" in page
        assert all(f"| {side} | " in page for side in part["result"].get("sides", {}))


def test_a_part_that_fails_is_survived(tmp_path: Path) -> None:
    """The parts after it run, and both files tell what happened."""
    from gpu_check import run_parts

    def broken() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    result = {"ways": {}, "limit": 1e-5, "failed": ["CPU: above 1e-05"]}
    todo = {"first": ("First", broken), "parity": ("Second", lambda: result)}
    found = run_parts(todo, {"date": "today", "device": "none"}, tmp_path)
    assert [part["ok"] for part in found["parts"].values()] == [False, False]
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == found
    page = (tmp_path / "gpu-check.md").read_text()
    assert "RuntimeError: out of memory" in page and "CPU: above 1e-05" in page


def test_a_side_that_fails_is_left_out() -> None:
    """The others are measured all the same, and one whose gradient is another's is found out."""
    from gpu.actor import make_rows
    from gpu.contest import contest
    from gpu.shapes import half_billion

    class Fixed:
        def __init__(self, norm: float) -> None:
            self.model, self.told, self._norm = torch.nn.Linear(1, 1), {}, norm

        def step(self) -> tuple[float, dict[str, float]]:
            if self._norm == 0:
                raise RuntimeError("out of memory")
            return self._norm, {}

    shape = half_billion(small=True)
    makers = {
        name: lambda norm=norm: Fixed(norm)
        for name, norm in {"a": 1.0, "b": 0.0, "c": 1.01, "d": 1.2}.items()
    }
    found = contest(
        makers,
        shape,
        make_rows(shape, padded=False),
        torch.device("cpu"),
        rounds=2,
        steps=3,
        until=float("inf"),
    )
    assert found["sides"]["a"]["samples"] == 6 and "samples" not in found["sides"]["b"]
    assert [failure[0] for failure in found["failed"]] == ["b", "d"]


def test_defaults_are_the_documented_ones() -> None:
    """What the script trains with, key by key, is what the service takes for keys that are not
    given."""
    from gpu.actor import defaults

    documented = ActorConfig.model_validate({"model": {"path": "somewhere"}}).model_dump()

    def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        for key, value in ours.items():
            if isinstance(value, dict):
                compare(value, theirs[key])
            else:
                assert value == theirs[key], key

    compare(defaults("somewhere"), documented)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            vocab_size=97,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            tie_word_embeddings=True,
        ),
        LlamaConfig(
            vocab_size=53,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=20,
            head_dim=16,
            tie_word_embeddings=False,
        ),
    ],
    ids=["qwen2, tied", "llama, wide heads"],
)
def test_flops_are_those_that_torch_counts(config: Any) -> None:
    """Forward and backward of a model with eager attention (which computes the whole square), row
    by row."""
    from gpu.shapes import step_flops

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    lengths = [5, 12]
    counter = FlopCounterMode(display=False)
    with counter:
        for length in lengths:
            model(input_ids=torch.arange(length)[None], use_cache=False).logits.sum().backward()
    # torch counts the backward of the first layer's inputs too, for the embedding; the rotary table
    # is a product as well.
    assert counter.get_total_flops() == pytest.approx(step_flops(config, lengths), rel=0.01)


def test_peaks_belong_to_their_devices() -> None:
    """The H100 of the data sheet, its slower PCIe card, and None for a device that is not known."""
    from gpu.shapes import peak_flops

    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("Tesla T4") is None
