"""``nexrl up`` on a folder of its own, and small models for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from nexrl_client import HTTPTrainServiceClient
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.processes import Child, Children, module


class Stack:
    """The whole service; leaving ``children`` stops it with Ctrl-C."""

    def __init__(self, children: Children) -> None:
        self.data = children.folder / "data"
        command = module(
            "nexrl_stack", "up", "--port", "0", "--slots", "2", "--data", str(self.data)
        )
        self.process: Child = children.start(
            "stack", command, talks=True, signal_number=signal.SIGINT
        )
        self.url = self.process.listen().split()[-1]

    def group(
        self, identifier: str, model: Path, ranks: int, **actor: Any
    ) -> HTTPTrainServiceClient:
        """A client of a new group."""
        client = HTTPTrainServiceClient(self.url, identifier)
        config = {"actor": {"model": {"path": str(model)}, **actor}}
        client.initialize_worker(config_dict=config, world_size=ranks)
        return client


def make_model(folder: Path, **sizes: int) -> Path:
    """A Llama with random weights, as a Hugging Face folder."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **sizes)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
