"""A full Hugging Face folder from a stream of whole tensors: what inference engines and
transformers load."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nexrl_storage import at
from nexrl_storage.manifest import (
    Export,
    FileEntry,
    describe,
    fingerprint_text,
    write_file,
    write_manifest,
)
from nexrl_storage.protocol import full_disk, invalid
from torch import Tensor

from nexrl_worker.checkpoint.model_files import CONFIG, copy_model_files
from nexrl_worker.checkpoint.tensor_file import set_metadata, write_tensors
from nexrl_worker.training.model.fingerprint import partial_fingerprint, weight_table
from nexrl_worker.training.model.weights import WEIGHTS, WEIGHTS_INDEX

if TYPE_CHECKING:
    from nexrl_worker.training.model.conversion import ExportLayout

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which weights these are. ``fingerprint``: of the group's own, 16 hex digits."""

    identifier: str
    step: int
    weight_version: int
    fingerprint: str


class FolderWriter:
    """Fills ``folder``, which is there and empty, with the model that ``source`` describes. Rank 0
    only; local.

    Tensors are written as ``layout`` names, cuts and casts them, as they come without one. At most
    ``shard_bytes`` of them are held at a time. Methods raise ``NO_SPACE`` or OSError and leave the
    clean-up to the caller.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        stamp: Stamp,
        shard_bytes: int = SHARD_BYTES,
        config_changes: Mapping[str, Any] = MappingProxyType({}),
        layout: ExportLayout | None = None,
    ) -> None:
        self._folder = folder
        self._config_changes = config_changes
        self._layout = layout
        self._source = source
        self._stamp = stamp
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[FileEntry, list[str]]] = []
        self._total = 0
        self._dtypes: Counter[str] = Counter()
        self._fingerprint = 0
        self._table: Tensor | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the model's next tensor; it must not change before the next call."""
        whole = ((name, tensor),)
        for written, part in self._layout.take(name, tensor) if self._layout else whole:
            self._put(written, part)

    def _put(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self._shard_bytes:
            self._flush(fingerprint=0)
        if self._table is None or self._table.device != tensor.device:
            self._table = weight_table(tensor.device)
        # Where the tensor is: a GPU is fast.
        self._fingerprint += int(partial_fingerprint(name, tensor, 0, self._table))
        self._held[name] = tensor.cpu()
        self._held_bytes += tensor.nbytes
        self._total += tensor.nbytes
        if tensor.is_floating_point():
            self._dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()

    def finish(self) -> Export:
        """Write what is left, the configuration, the tokenizer, and last the record of it all."""
        with full_disk(self._folder):
            if self._layout is not None:
                self._layout.check_complete()
            self._flush(self._fingerprint)
            weights = self._name_shards()
            dtypes = [name for name, _ in self._dtypes.most_common()]
            small = copy_model_files(self._source, self._folder, self._config_changes, dtypes)
            if not any(entry.name == CONFIG for entry in small):
                raise invalid(f"the model's folder {self._source} has no config.json any more")
            export = Export(
                identifier=self._stamp.identifier,
                step=self._stamp.step,
                fingerprint=fingerprint_text(self._fingerprint),
                master_fingerprint=self._stamp.fingerprint or None,
                created=time.time(),
                files=(*weights, *small),
                weight_version=self._stamp.weight_version,
            )
            write_manifest(self._folder, export)
        return export

    def _flush(self, fingerprint: int) -> None:
        """Write what is held; 0 stands for a fingerprint that only :meth:`_name_shards` knows."""
        metadata = {
            "format": "pt",
            "weight_version": str(self._stamp.weight_version),
            "fingerprint": fingerprint_text(fingerprint),
        }
        path = self._folder / f"part-{len(self._shards) + 1:05d}"
        entry = write_tensors(path, self._held, metadata)
        self._shards.append((entry, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def _name_shards(self) -> list[FileEntry]:
        """The files' names depend on how many there are, and what they say of all weights on the
        last; both are known now."""
        count, entries, where = len(self._shards), [], {}
        for number, (entry, names) in enumerate(self._shards, 1):
            final = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            at(self._folder).move(self._folder / entry.name, self._folder / final)
            if number < count:
                fingerprint = fingerprint_text(self._fingerprint)
                set_metadata(self._folder / final, "fingerprint", fingerprint)
                entries.append(describe(self._folder, final))
            else:
                entries.append(entry.model_copy(update={"name": final}))
            where.update(dict.fromkeys(names, final))
        if count > 1:
            about = {"total_size": self._total}
            index = {"metadata": about, "weight_map": dict(sorted(where.items()))}
            text = json.dumps(index, indent=2).encode()
            entries.append(write_file(self._folder, WEIGHTS_INDEX, text))
        return entries


def export(
    stream: Iterable[tuple[str, Tensor | None]], writer: FolderWriter | None
) -> Exception | None:
    """Drain ``stream`` into ``writer`` (None on every rank but 0). Collective where the stream is.

    An error of the writer is returned, not raised, after the stream has ended: a rank that left
    early would hang the others. Raise it inside the vote that follows.
    """
    failure: Exception | None = None
    for name, tensor in stream:
        if writer is not None and tensor is not None and failure is None:
            try:
                writer.add(name, tensor)
            except Exception as error:
                failure = error
    return failure
