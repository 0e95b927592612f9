"""The operations on checkpoints: which file work each rank does, where the ranks vote, and what is
collective in between."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage.files import replace_folder, write_file
from nexrl_storage.manifest import (
    FileEntry,
    Manifest,
    describe,
    fingerprint_text,
    index_name,
    write_manifest,
)

from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.checkpoint.load import LoadPlan, inspect
from nexrl_worker.checkpoint.publish import PlainPath, VersionedPath
from nexrl_worker.checkpoint.readers import HuggingFaceReader, ShardReader, TensorReader
from nexrl_worker.checkpoint.shards import (
    MODEL_FILES,
    GroupState,
    discard_staging,
    prepare_staging,
    read_index,
    staging_folder,
    write_shards,
)
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.request import Outcome
from nexrl_worker.settings import GroupFolders, RankSettings
from nexrl_worker.snapshot import SNAPSHOT_FILE, Snapshot, read_snapshot
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.state import TrainingState, rng_state, seed_all, set_rng_state

if TYPE_CHECKING:
    from nexrl_contract.sections import ActorConfig


class CheckpointManager:
    """Saves and loads one group's state. Every method is collective; a refused one has changed
    nothing."""

    def __init__(self, settings: RankSettings, config: ActorConfig, control: ControlGroup) -> None:
        self._settings = settings
        self._config = config
        self._control = control
        self._source = Path(config.model.path)

    # --- saving ---

    def save(self, model: TrainingState, job_id: str, params: dict[str, Any], seq: int) -> Outcome:
        """Sharded: into staging, the checkpointer publishes. Hugging Face: published here, complete
        on return."""
        step, path = int(params["global_step"]), Path(params["local_path"])
        if not params["saved_fully_shared_ckpt"]:
            return Outcome(
                {
                    "path": str(path),
                    "kind": "huggingface",
                    **self._export(model, VersionedPath(path, self._name), step),
                }
            )
        staging = staging_folder(self._settings.data, job_id)
        weight_only = bool(params["save_weight_only"]) or not model.learns
        self._write_sharded(model, staging, step, seq, weight_only=weight_only)
        return Outcome(
            publish={
                "staging": str(staging),
                "path": str(path),
                "step": step,
                "kind": "sharded",
                "weight_only": weight_only,
                "remove_previous": bool(params["remove_previous_ckpt"]),
                "world_size": self._control.size,
                "config_hash": self._config_hash(),
                "fingerprint": fingerprint_text(model.fingerprint()),
                "result": {"weight_version": model.weight_version},
            }
        )

    def convert(self, model: TrainingState, params: dict[str, Any]) -> Outcome:
        """A published sharded checkpoint becomes its sibling ``-hf``; a path that does not exist
        yet gets the current weights."""
        path = Path(params["local_path"])
        if not self._from_rank_0({"there": os.path.lexists(path)})["there"]:
            step = model.optimizer_steps
            return Outcome(
                {
                    "path": str(path),
                    "kind": "huggingface",
                    **self._export(model, PlainPath(path, self._name), step),
                }
            )
        target = path.with_name(f"{path.name}-hf")
        self._control.vote(
            lambda: (
                self._convert_folder(model, path, PlainPath(target, self._name))
                if self._control.rank == 0
                else None
            )
        )
        return Outcome({"path": str(target), "kind": "huggingface"})

    def _export(
        self, model: TrainingState, path: VersionedPath | PlainPath, step: int
    ) -> dict[str, Any]:
        """Gather every tensor to rank 0, which writes and publishes the folder."""
        first = self._control.rank == 0
        self._control.vote(path.check if first else _nothing)
        fingerprint = fingerprint_text(model.fingerprint())
        stamp = Stamp(self._name, step, model.weight_version, fingerprint)

        def begin() -> FolderWriter | None:
            if not first:
                return None
            layout = model.layout()
            return FolderWriter(
                path.begin(),
                self._source,
                stamp,
                config_changes=model.config_changes(),
                layout=layout,
            )

        writer = self._control.vote(begin)
        failure = export(model.full_weights(), writer)

        def publish() -> dict[str, Any]:
            if failure is not None:
                raise failure
            if writer is None:
                return {}
            record = writer.finish()
            path.commit()
            return {
                "fingerprint": record.fingerprint,
                "master_fingerprint": record.master_fingerprint,
            }

        try:
            marks = self._from_rank_0(self._control.vote(publish))
        except ServiceError:
            if first:
                path.discard()
            raise
        return {"global_step": step, "weight_version": model.weight_version, **marks}

    def _convert_folder(self, model: TrainingState, path: Path, target: PlainPath) -> None:
        plan = inspect(path)
        if not isinstance(plan.record, Manifest):
            raise ServiceError(
                "CHECKPOINT_INVALID",
                f"{path} is no sharded checkpoint of this service; there is nothing to convert",
            )
        plan.verify(0, 1)
        target.check()
        stamp = Stamp(
            plan.record.identifier, plan.record.step, plan.record.seq, plan.record.fingerprint or ""
        )
        try:
            with ShardReader(plan.folder, plan.record) as reader:
                layout = model.layout_of(plan.folder / MODEL_FILES, reader.shapes, plan.state())
                writer = FolderWriter(
                    target.begin(), plan.folder / MODEL_FILES, stamp, layout=layout
                )
                for name, tensor in reader.weights():
                    writer.add(name, tensor)
                writer.finish()
            target.commit()
        except BaseException:
            target.discard()
            raise

    def _write_sharded(
        self, model: TrainingState, folder: Path, step: int, seq: int, *, weight_only: bool
    ) -> None:
        rank, size = self._control.rank, self._control.size
        state = {
            "architecture": model.architecture(),
            "source": model.source,
            "scalars": model.scalars(),
            "step": step,
            "seq": seq,
            "seed": self._config.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        group = GroupState(state, self._source, model.config_changes()) if rank == 0 else None
        self._control.vote(lambda: prepare_staging(folder) if rank == 0 else None)
        try:
            self._control.vote(
                lambda: write_shards(
                    folder,
                    rank,
                    size,
                    model.shards(optimizer=not weight_only),
                    rng_state(),
                    group,
                    weight_only=weight_only,
                )
            )
        except ServiceError:
            if rank == 0:
                discard_staging(folder)
            raise

    # --- loading ---

    def load(self, model: TrainingState, params: dict[str, Any]) -> Outcome:
        """Everything is verified on all ranks before the first weight changes; any world size
        loads."""
        first = self._control.rank == 0
        resolved = self._control.vote(lambda: str(Path(params["path"]).resolve()) if first else "")
        folder = Path(self._from_rank_0({"folder": resolved})["folder"])
        plan = self._control.vote(lambda: inspect(folder))
        self._control.vote(lambda: plan.verify(self._control.rank, self._control.size))
        restored = self._load(
            model, plan, weight_only=bool(params["load_weight_only"]) or not model.learns
        )
        step = {} if plan.step is None else {"global_step": plan.step}
        return Outcome(
            {"path": params["path"], "kind": plan.kind, **step, **restored}, applied=True
        )

    def _load(
        self, model: TrainingState, plan: LoadPlan, *, weight_only: bool, kept: bool = False
    ) -> dict[str, Any]:
        """``optimizer``: restored or kept as it was; ``rng``: restored, reseeded, or kept;
        ``dtype``: of an export's weights.

        ``kept``: it is the group's own state, which comes back whatever its numbers are.
        """
        mark = self._from_rank_0({"mark": plan.mark})["mark"]
        opened = self._control.vote(plan.reader)
        reader = self._control.vote(lambda: _accounted(model, plan, opened))
        try:
            full = plan.has_optimizer and not weight_only
            needed = {part.name: part.global_shape for part in model.shards(optimizer=full)}
            whole = self._control.rank == 0  # which alone has the saved buffers
            self._control.vote(lambda: plan.check_fits(reader, needed, model.architecture(), whole))
            if not kept:
                self._control.vote(lambda: _check_numbers(model, plan, reader, full))
            self._control.vote(lambda: plan.check_unchanged(mark))
            state = self._control.vote(lambda: _usable_state(model, plan)) if full else {}
            rng = (
                self._control.vote(lambda: _usable_rng(model, plan, self._control))
                if full
                else None
            )
            model.load_shards(reader, optimizer=full)
        finally:
            reader.close()
        held = (
            {"dtype": ", ".join(sorted(opened.weight_dtypes))}
            if isinstance(opened, HuggingFaceReader)
            else {}
        )
        if not full:
            return {**held, "optimizer": "kept", "rng": "kept"}
        model.load_scalars(state["scalars"])
        if rng is not None:
            set_rng_state(rng)
        else:
            seed_all(int(state["seed"]), self._control.rank)
        return {
            **held,
            "optimizer": "restored",
            "rng": "restored" if rng is not None else "reseeded",
        }

    def _from_rank_0(self, seen: dict[str, Any]) -> dict[str, Any]:
        """What rank 0 sees of the file system, on every rank: it may look different a moment
        later."""
        return self._control.broadcast(seen)

    # --- clean stop and start ---

    def suspend(self, model: TrainingState, kept: Snapshot) -> None:
        """Keep the state for the next start; nothing is written when it is there already."""
        state = self._folders.state
        before = self._control.vote(lambda: read_snapshot(state))
        if not kept.dropped and (kept.seq, kept.lost) == (before.seq, before.lost):
            return
        folder = self._folders.new_state
        self._write_sharded(model, folder, model.optimizer_steps, kept.seq, weight_only=False)

        def publish() -> None:
            write_manifest(folder, self._suspended_manifest(folder, kept.seq))
            write_file(folder / SNAPSHOT_FILE, json.dumps(kept._asdict()).encode())
            replace_folder(folder, state)

        self._control.vote(publish if self._control.rank == 0 else _nothing)

    def resume(self, model: TrainingState) -> Snapshot:
        """Load what :meth:`suspend` kept, if anything, and say what that is."""
        kept = self._control.vote(lambda: read_snapshot(self._folders.state))
        if kept.seq > 0:
            plan = self._control.vote(lambda: inspect(self._folders.state))
            self._load(model, plan, weight_only=False, kept=True)
        return kept

    def _suspended_manifest(self, folder: Path, seq: int) -> Manifest:
        files: list[FileEntry] = []
        for rank in range(self._control.size):
            files += [
                FileEntry(**entry)
                for entry in read_index(folder, rank, self._control.size)["files"]
            ]
            files.append(describe(folder, index_name(rank, self._control.size)))
        return Manifest(
            identifier=self._name,
            job_id="suspended",
            step=0,
            seq=seq,
            world_size=self._control.size,
            config_hash=self._config_hash(),
            weight_only=False,
            created=time.time(),
            files=tuple(files),
        )

    @property
    def _name(self) -> str:
        return self._settings.identifier

    @property
    def _folders(self) -> GroupFolders:
        return GroupFolders(self._settings.data, self._settings.identifier)

    def _config_hash(self) -> str:
        text = json.dumps(self._settings.config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _accounted(model: TrainingState, plan: LoadPlan, opened: TensorReader) -> TensorReader:
    """Of a Hugging Face folder every tensor's place in the model, and that none holds NaN."""
    if not isinstance(opened, HuggingFaceReader):
        return opened
    try:
        return model.account(opened)
    except InvalidValue as error:
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{plan.folder}: {error.message}", **error.details()
        ) from None


def _check_numbers(model: TrainingState, plan: LoadPlan, reader: TensorReader, full: bool) -> None:
    """Of a sharded checkpoint; a Hugging Face folder's are part of its account. Its files were
    hashed a moment ago."""
    if plan.kind != "sharded":
        return
    try:
        model.check_finite(reader, full)
    except InvalidValue as error:
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{plan.folder}: {error.message}", **error.details()
        ) from None


def _usable_state(model: TrainingState, plan: LoadPlan) -> dict[str, Any]:
    state = plan.state()
    if missing := model.scalars().keys() - state["scalars"].keys():
        raise ServiceError(
            "CHECKPOINT_INVALID", f"the state in {plan.folder} lacks {', '.join(sorted(missing))}"
        )
    return state


def _usable_rng(
    model: TrainingState, plan: LoadPlan, control: ControlGroup
) -> dict[str, Any] | None:
    """Tried before any weight changes."""
    rng = plan.rng(control.rank, control.size)
    if rng is not None:
        before = rng_state()
        try:
            set_rng_state(rng)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{plan.folder} has no random state: {error}"
            ) from error
        finally:
            set_rng_state(before)
    return rng


_nothing: Callable[[], None] = lambda: None  # noqa: E731 - what a rank without work does in a vote
