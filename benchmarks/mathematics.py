"""The worker's mathematics by itself: packing against padding, and the memory of the output
head."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.processes import Children, module
from benchmarks.results import Findings, Measure, Table, number, ratios, spread

TOKENS, VOCABULARY, WIDTH = 2048, 50_000, 256
_SAME_NORM = 1e-4
METHOD = (
    "Packing: seconds of one PPO update (forward, backward, AdamW) in one process of one thread, "
    "with packing on and off in turns, on "
    "the same Qwen2 of 4 layers, width 384 and 8192 tokens, the same rows of which 40 % is "
    "padding, in one micro-batch; "
    "both must report the same gradient norm, or the run fails. Head: log-probabilities and "
    "entropies of 2048 tokens "
    "over 50,000 tokens of vocabulary from hidden states of width 256, forward and backward, in a "
    "process of its own "
    "each: its peak resident memory above what it held before, chunked as the worker does it and "
    "by log_softmax over "
    "all logits."
)


def run(folder: Path, repetitions: int, *, quick: bool) -> Findings:
    """Steps in turns; every peak is measured once."""
    found = Findings("Mathematics", METHOD)
    with Children(folder) as children:
        for length, rows in ((512, 5),) if quick else ((512, 8), (1024, 5)):
            _packing(found, children, folder / f"model-{length}", length, rows, repetitions)
        _head(found, children)
    return found


def _packing(
    found: Findings, children: Children, model: Path, length: int, rows: int, repetitions: int
) -> None:
    child = children.start(
        f"packing-{length}",
        module("benchmarks.packed_step", str(model), str(length), str(rows)),
        talks=True,
    )
    told = json.loads(child.listen())
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for repetition in range(-1, repetitions):  # the first one warms up
        norms = []
        for way, taken in seconds.items():
            spent, norm = json.loads(child.ask(way))
            norms.append(norm)
            if repetition >= 0:
                taken.append(spent)
        if not math.isclose(*norms, rel_tol=_SAME_NORM):
            raise RuntimeError(f"the two did not do the same work: gradient norms {norms}")
    child.ask("enough")
    label = f"packing on against off, {told['padding']:.0%} padding ({rows} x {length})"
    found.measures.append(
        Measure.of(label, ratios(seconds["off"], seconds["on"]), 1.4, at_least=True)
    )
    lines = [(f"packing {way}", *spread(taken)) for way, taken in seconds.items()]
    found.tables.append(
        Table(f"Seconds of an update ({rows} x {length})", ("what", "median", "spread"), lines)
    )


def _head(found: Findings, children: Children) -> None:
    sizes = str(TOKENS), str(VOCABULARY), str(WIDTH)
    grown = {
        way: float(
            children.start(
                f"head-{way}", module("benchmarks.head_memory", way, *sizes), talks=True
            ).listen()
        )
        for way in ("chunked", "plain")
    }
    one = TOKENS * VOCABULARY * 4 / 1024**2
    gradients = (TOKENS + VOCABULARY) * WIDTH * 4 / 1024**2
    name = (
        f"chunked log-probabilities: peak beside gradients, over one [{TOKENS},{VOCABULARY}] "
        "float32"
    )
    found.measures.append(Measure(name, (grown["chunked"] - gradients) / one, 0.5, at_least=False))
    lines = [(way, number(mib)) for way, mib in grown.items()]
    lines += [
        ("one copy of the logits", number(one)),
        ("gradients of hidden states and head", number(gradients)),
    ]
    found.tables.append(
        Table("Peak memory of the head, forward and backward: MiB", ("what", "MiB"), lines)
    )
