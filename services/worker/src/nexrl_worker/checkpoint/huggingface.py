"""A full Hugging Face folder from a stream of whole tensors: what inference engines and transformers load."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nexrl_contract.durable import sync_folder, write_file
from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import Export, FileEntry, describe, write_manifest
from torch import Tensor

from nexrl_worker.checkpoint.model_files import CONFIG, copy_model_files, set_dtype
from nexrl_worker.checkpoint.readers import WEIGHTS, WEIGHTS_INDEX
from nexrl_worker.checkpoint.tensor_file import no_space, write_tensors

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which weights these are; written into every file. ``fingerprint`` is 16 hex digits."""

    identifier: str
    step: int
    weight_version: int
    fingerprint: str


class FolderWriter:
    """Fills ``folder``, which is there and empty, with the model that ``source`` describes. Rank 0 only; local.

    At most ``shard_bytes`` of tensors are held at a time. Methods raise ``NO_SPACE`` or OSError and leave the clean-
    up to the caller.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        stamp: Stamp,
        shard_bytes: int = SHARD_BYTES,
        config_changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._folder = folder
        self._config_changes = config_changes
        self._source = source
        self._stamp = stamp
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[FileEntry, list[str]]] = []
        self._total = 0
        self._dtype = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; it must not change before the next call."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + nbytes > self._shard_bytes:
            self._flush()
        self._held[name] = tensor
        self._held_bytes += nbytes
        self._total += nbytes
        if tensor.is_floating_point() and not self._dtype:
            self._dtype = str(tensor.dtype).removeprefix("torch.")

    def finish(self) -> Export:
        """Write what is left, the configuration, the tokenizer, and last the record of it all, synced."""
        try:
            self._flush()
            weights = self._name_shards()
            small = copy_model_files(self._source, self._folder, self._config_changes)
            if CONFIG not in small:
                raise ServiceError(
                    "CHECKPOINT_INVALID", f"the model's folder {self._source} has no config.json any more"
                )
            set_dtype(self._folder, self._dtype)
            return self._record(weights, small)
        except OSError as error:
            raise no_space(error, self._folder) from error

    def _flush(self) -> None:
        metadata = {
            "format": "pt",
            "weight_version": str(self._stamp.weight_version),
            "fingerprint": self._stamp.fingerprint,
        }
        entry = write_tensors(self._folder / f"part-{len(self._shards) + 1:05d}", self._held, metadata)
        self._shards.append((entry, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def _name_shards(self) -> list[FileEntry]:
        """The file names depend on how many there are, which is known now."""
        count, entries, where = len(self._shards), [], {}
        for number, (entry, names) in enumerate(self._shards, 1):
            final = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.rename(self._folder / entry.name, self._folder / final)
            entries.append(entry.model_copy(update={"name": final}))
            where.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            write_file(self._folder / WEIGHTS_INDEX, json.dumps(index, indent=2).encode())
            entries.append(describe(self._folder, WEIGHTS_INDEX))
        return entries

    def _record(self, weights: list[FileEntry], small: list[str]) -> Export:
        export = Export(
            identifier=self._stamp.identifier,
            step=self._stamp.step,
            fingerprint=self._stamp.fingerprint,
            created=time.time(),
            files=(*weights, *(describe(self._folder, name) for name in small)),
            weight_version=self._stamp.weight_version,
        )
        write_manifest(self._folder, export)
        sync_folder(self._folder)
        return export


def export(stream: Iterable[tuple[str, Tensor | None]], writer: FolderWriter | None) -> Exception | None:
    """Drain ``stream`` into ``writer`` (None on every rank but 0). Collective where the stream is.

    An error of the writer is returned, not raised, after the stream has ended: a rank that left early would hang the
    others.
    Raise it inside the vote that follows.
    """
    failure: Exception | None = None
    for name, tensor in stream:
        if writer is not None and tensor is not None and failure is None:
            try:
                writer.add(name, tensor)
            except Exception as error:
                failure = error
    return failure
