"""``python -m benchmarks.packed_step MODEL LENGTH ROWS``: for each line, ``on`` or ``off``, one
update packed or padded.

Says the batch's padding share first, as JSON, then for every update its seconds and the gradient's
norm. MODEL is a folder to make.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig
from nexrl_worker.training import Engine
from nexrl_worker.training.batch.layout import RowsInMemory
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

SHORTEST = 0.2  # rows of 20 to 100 % of the longest: 40 % of the rectangle is padding
_CPU = torch.device("cpu")


def make_rows(length: int, count: int, vocabulary: int) -> RowsInMemory:
    """Right-padded rows of lengths spread evenly; everything after a row's first quarter is
    scored."""
    random = torch.Generator().manual_seed(0)
    lengths = (torch.linspace(SHORTEST, 1.0, count) * length).long()
    places = torch.arange(length)
    attention = (places < lengths[:, None]).long()
    return RowsInMemory(
        {
            "input_ids": torch.randint(0, vocabulary, (count, length), generator=random),
            "attention_mask": attention,
            "loss_mask": attention * (places >= lengths[:, None] // 4),
            "advantages": torch.randn(count, length, generator=random),
        }
    )


def make_model(folder: Path) -> Qwen2Config:
    """A random Qwen2 with a tied head and grouped heads."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return config


def make_engine(folder: Path, packing: bool) -> Engine:
    """An actor that packs, or the run fails."""
    actor = ActorConfig.model_validate(
        {
            "model": {"path": str(folder), "use_remove_padding": packing},
            "optim": {"lr": 0.0},
            "grad_clip": 1.0,
        }
    )
    engine = Engine.build(actor, "actor", _CPU)
    if engine.info()["packing"] is not packing:
        raise RuntimeError(f"packing is off: {engine.info()['packing_reason']}")
    return engine


def main(folder: Path, length: int, count: int) -> None:
    """Serve updates until another line comes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=0, world_size=1)
    torch.set_num_threads(1)
    rows = make_rows(length, count, make_model(folder).vocab_size)
    engines = {"on": make_engine(folder, True), "off": make_engine(folder, False)}
    lengths = [int(n) for n in rows.tensors["attention_mask"].sum(dim=1)]
    _say({"padding": 1.0 - sum(lengths) / (length * count)})
    while (engine := engines.get(sys.stdin.readline().strip())) is not None:
        start = time.perf_counter()
        prepared = engine.prepare("update_actor", rows, {})
        result = engine.update(prepared, engine.plan(prepared, lengths))
        _say([time.perf_counter() - start, result[0].metrics["actor/grad_norm"]])
    _say("done")
    dist.destroy_process_group()


def _say(answer: Any) -> None:
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
