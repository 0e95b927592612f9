"""A group's state on one rank: what checkpoints hold, what a fingerprint covers."""

from __future__ import annotations

import base64
import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.conversion import ExportLayout, FolderTensors
from nexrl_worker.training.model.fingerprint import partial_fingerprint, weight_table
from nexrl_worker.training.model.roles import ROLES, Role
from nexrl_worker.training.model.weight_sources import Account, has_own_head
from nexrl_worker.training.model.weights import (
    Reader,
    Shard,
    check_finite,
    fill,
    gather,
)
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.trainer import Trainer


class TrainingState:
    """A sharded model and its trainer (None where the role does not learn).

    `source`: the dtypes, by name, of the folder that the model was made of; `export_dtype` None
    exports in those.
    """

    def __init__(
        self,
        role: Role,
        model: ModelWrapper,
        trainer: Trainer | None,
        device: torch.device,
        source: Mapping[str, str],
        export_dtype: torch.dtype | None,
    ) -> None:
        self._role = role
        self._source = dict(source)
        self._export_dtype = export_dtype
        self._model = model
        self._trainer = trainer
        self._device = device
        self.weight_version = 0
        """Loads and optimizer steps so far."""
        self._loaded = False

    @property
    def learns(self) -> bool:
        """Whether the role has an optimizer: what is saved of others is weights."""
        return self._trainer is not None

    @property
    def pending(self) -> bool:
        """True while gradients of forward_backward await optim_step."""
        return self._trainer is not None and self._trainer.pending

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far, the schedule's position; 0 where the role does not learn."""
        return 0 if self._trainer is None else self._trainer.steps

    @property
    def unchanged(self) -> bool:
        """True while the weights are those of the folder that the group was made of."""
        return not self._loaded and self.optimizer_steps == 0

    def architecture(self) -> str:
        """The class of the model with its head: a checkpoint of another one is not loaded."""
        return type(self._model.hf).__name__

    def shards(self, optimizer: bool = True) -> Iterator[Shard]:
        """This rank's part of the state: weights, saved buffers (rank 0), moments if any."""
        yield from _once(self._model.weights())
        if optimizer and self._trainer is not None:
            yield from self._trainer.optimizer.shards()

    def check_finite(self, reader: Reader, optimizer: bool) -> None:
        """Raise InvalidValue naming the first tensor in which this rank's rows of `reader` hold
        NaN. Local.

        Infinity is refused in a weight, too; a second moment may have reached it.
        """
        check_finite(self._model.weights(), reader)
        if optimizer and self._trainer is not None:
            for part in self._trainer.optimizer.shards():
                if bool(
                    reader.read(part.name, part.offset_dim0, len(part.local_tensor)).isnan().any()
                ):
                    raise InvalidValue(f"{part.name} holds NaN", tensor=part.name)

    def load_shards(self, reader: Reader, optimizer: bool = True) -> None:
        """Overwrite weights, and moments if `optimizer`, with this rank's rows from `reader`."""
        self._loaded = True
        fill(self._model.weights(), reader)
        if optimizer and self._trainer is not None:
            fill(self._trainer.optimizer.shards(), reader)
        self.weight_version += 1

    def scalars(self) -> dict[str, int]:
        """What is no tensor: steps (the schedule's position), AdamW's count, weight version."""
        taken = 0 if self._trainer is None else self._trainer.optimizer.steps
        return {
            "optimizer_steps": self.optimizer_steps,
            "adamw_steps": taken,
            "weight_version": self.weight_version,
        }

    def load_scalars(self, scalars: Mapping[str, int]) -> None:
        """Restore what `scalars` returned."""
        self.weight_version = int(scalars["weight_version"])
        if self._trainer is not None:
            self._trainer.steps = int(scalars["optimizer_steps"])
            self._trainer.optimizer.steps = int(scalars["adamw_steps"])

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Names and tensors of the model, one at a time: whole on rank 0's device, None elsewhere.
        Collective.

        `layout` makes of them what a folder holds.
        """
        return ((part.name, gather(part)) for part in self._model.exported())

    def layout(self) -> ExportLayout:
        """How an export of this group is written; local, and once for each export."""
        return ExportLayout(self._model.hf, self._source, self._export_dtype)

    @property
    def source(self) -> dict[str, str]:
        """What a sharded checkpoint keeps for `layout_of`: dtypes by name of the model's folder."""
        return self._source

    def layout_of(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Any]
    ) -> ExportLayout:
        """How a checkpoint's tensors of these `shapes` are written: `folder` has its configuration,
        `saved` is its state.

        Of a model that is not this group's an empty one is made. Raises InvalidValue where there is
        no such class. Local.
        """
        hf, held = self._model.hf, self._model.exported()
        if any(shapes.get(part.name) != part.global_shape for part in held if not part.replicated):
            hf = _empty_model(folder, saved.get("architecture"))
        dtype = self._export_dtype
        if dtype is None and "source" not in saved:  # from before it was kept
            said = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
            dtype = said if isinstance(said, torch.dtype) else None
        return ExportLayout(hf, saved.get("source", {}), dtype)

    def account(self, folder: FolderTensors) -> Account:
        """A reader of the model's tensors from a folder that others made; raises InvalidValue.
        Local.

        Every tensor there is accounted for, and what is named, cut or stored otherwise than in the
        model is converted.
        """
        if has_own_head(self._model.hf, folder):
            raise InvalidValue(
                "the output head is not the embedding, as in the group's model, which has one for "
                "both"
            )
        found = Account(self._model, folder, self._role, fresh=False)
        check_finite(self._model.exported(), found)
        return found

    def config_changes(self) -> dict[str, Any]:
        """What an exported config.json says otherwise than the group's own folder: its head."""
        untied = {"tie_word_embeddings": False} if self._model.own_head else {}
        if not self._role.fresh_head:
            return untied
        config: Any = self._model.config
        return {
            **untied,
            "architectures": [self.architecture()],
            "id2label": {str(number): label for number, label in config.id2label.items()},
            "label2id": config.label2id,
        }

    def fingerprint(self) -> int:
        """64-bit number of the weights, the same at any world size: fingerprint.py. Collective."""
        table = weight_table(self._device)
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for part in _once(self._model.exported()):
            row = math.prod(part.global_shape[1:])
            total += partial_fingerprint(
                part.name, part.local_tensor, part.offset_dim0 * row, table
            )
        dist.all_reduce(total)
        return int(total) % (1 << 64)


def _once(parts: Iterable[Shard]) -> Iterator[Shard]:
    """Without what every rank holds whole, but on rank 0: over all ranks each element once."""
    return (part for part in parts if not part.replicated or dist.get_rank() == 0)


def _empty_model(folder: Path, architecture: str | None) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for role in (ROLES[name] for name in ("actor", "critic", "reward")):
        role.prepare(config)
        with contextlib.suppress(ValueError), torch.device("meta"):  # a family may lack a class
            model = role.make(config)
            if architecture in (None, type(model).__name__):
                return model
    raise InvalidValue(f"the checkpoint holds a {architecture}, which nothing here makes")


# -- random generators


def rng_state() -> dict[str, Any]:
    """States of torch (CPU and the current CUDA device), NumPy and Python; JSON-able."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; a CUDA state is ignored where there is no CUDA."""
    torch.set_rng_state(_decode(state["torch"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def seed_all(seed: int, rank: int) -> None:
    """Seed every generator from (seed, rank)."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
