"""The operations on checkpoints: which file work each rank does, where the ranks vote, and what is
collective in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage import at, local_folder
from nexrl_storage.manifest import (
    Export,
    Manifest,
    fingerprint_text,
    staged_files,
    staging_folder,
    write_file,
    write_manifest,
)
from nexrl_storage.protocol import full_disk, invalid
from nexrl_storage.publish import Replacement, Versions

from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.checkpoint.load import LoadPlan, TensorReader, inspect, invalid_folder
from nexrl_worker.checkpoint.shards import MODEL_FILES, GroupState, ShardReader, write_shards
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.request import Outcome
from nexrl_worker.settings import GroupFolders, RankSettings
from nexrl_worker.snapshot import SNAPSHOT_FILE, Snapshot, read_snapshot
from nexrl_worker.training.model.weights import dtype_name
from nexrl_worker.training.state import TrainingState, rng_state, seed_all, set_rng_state

if TYPE_CHECKING:
    from nexrl_contract.sections import ActorConfig


Answer = TypeVar("Answer")


class _Saved(NamedTuple):
    """A checkpoint that can be loaded: ``dtype`` of an export's weights; ``state`` and ``rng`` only
    where the optimizer's are restored, ``rng`` where the world size is the same."""

    reader: TensorReader
    dtype: str
    state: dict[str, Any]
    rng: dict[str, Any] | None = None


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
        step, path = int(params["global_step"]), str(params["local_path"])
        if not params["saved_fully_shared_ckpt"]:
            return self._export(model, Versions(path, self._name), step)
        staging = staging_folder(self._settings.data, job_id)
        weight_only = bool(params["save_weight_only"]) or not model.learns
        self._write_sharded(model, staging, step, seq, weight_only=weight_only)
        return Outcome(
            publish={
                "staging": str(staging),
                "path": path,
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
        path = str(params["local_path"])
        there = self._control.decide(lambda: {"there": at(path).look(path) is not None})["there"]
        if not there:
            return self._export(model, Replacement(path, self._name, Export), model.optimizer_steps)
        target = Replacement(f"{path}-hf", self._name, Export)
        self._on_rank_0(lambda: self._convert_folder(model, path, target))
        return Outcome({"path": target.path, "kind": "huggingface"})

    def _export(self, model: TrainingState, target: Replacement[Export], step: int) -> Outcome:
        """Gather every tensor to rank 0, which writes and publishes the folder."""
        self._on_rank_0(target.check)
        fingerprint = fingerprint_text(model.fingerprint())
        stamp = Stamp(self._name, step, model.weight_version, fingerprint)
        writer = self._on_rank_0(
            lambda: FolderWriter(
                target.begin(),
                self._source,
                stamp,
                config_changes=model.config_changes(),
                layout=model.layout(),
            )
        )
        failure = export(model.full_weights(), writer)

        def publish() -> dict[str, Any]:
            if failure is not None:
                raise failure
            assert writer is not None
            record = writer.finish()
            target.commit()
            return record.model_dump(include={"fingerprint", "master_fingerprint"})

        try:
            marks = self._control.decide(publish)
        except ServiceError:
            if self._control.rank == 0:
                target.discard()
            raise
        about = {"path": target.path, "kind": "huggingface", "global_step": step}
        return Outcome({**about, "weight_version": model.weight_version, **marks})

    def _convert_folder(self, model: TrainingState, path: str, target: Replacement[Export]) -> None:
        plan = inspect(path)
        record, source = plan.record, plan.folder / MODEL_FILES
        if not isinstance(record, Manifest):
            reason = "is no sharded checkpoint of this service; there is nothing to convert"
            raise invalid(f"{path} {reason}")
        plan.verify(0, 1)
        target.check()
        stamp = Stamp(record.identifier, record.step, record.seq, record.fingerprint or "")
        reader = ShardReader(plan.folder, record)
        try:
            layout = model.layout_of(source, reader.shapes, plan.state())
            writer = FolderWriter(target.begin(), source, stamp, layout=layout)
            for name, tensor in reader.weights():
                writer.add(name, tensor)
            writer.finish()
            target.commit()
        except BaseException:
            target.discard()
            raise
        finally:
            reader.close()

    def _write_sharded(
        self, model: TrainingState, folder: Path, step: int, seq: int, *, weight_only: bool
    ) -> None:
        """Every rank writes its rows into ``folder``, which is emptied first."""
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
        self._on_rank_0(lambda: empty_folder(folder))
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
                with contextlib.suppress(OSError):
                    at(folder).remove(folder, recursive=True)
            raise

    # --- loading ---

    def load(self, model: TrainingState, params: dict[str, Any]) -> Outcome:
        """Everything is verified on all ranks before the first weight changes; any world size
        loads."""
        # Rank 0 follows the link for all of them: it may lead elsewhere a moment later.
        found = self._control.decide(lambda: {"folder": str(local_folder(params["path"]))})
        plan = self._control.vote(lambda: inspect(found["folder"]))
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
        mark = self._control.broadcast({"mark": plan.mark})["mark"]
        full = plan.has_optimizer and not weight_only
        saved = self._control.vote(lambda: self._prepared(model, plan, mark, full, kept))
        try:
            model.load_shards(saved.reader, optimizer=full)
        finally:
            saved.reader.close()
        held = {"dtype": saved.dtype} if saved.dtype else {}
        if not full:
            return {**held, "optimizer": "kept", "rng": "kept"}
        model.load_scalars(saved.state["scalars"])
        if saved.rng is None:
            seed_all(int(saved.state["seed"]), self._control.rank)
        else:
            set_rng_state(saved.rng)
        how = "reseeded" if saved.rng is None else "restored"
        return {**held, "optimizer": "restored", "rng": how}

    def _prepared(
        self, model: TrainingState, plan: LoadPlan, mark: str, full: bool, kept: bool
    ) -> _Saved:
        """Opens a checkpoint and looks for all that can be wrong with it, before any weight
        changes. Local."""
        opened, dtype = plan.reader(), ""
        reader: TensorReader = opened
        with invalid_folder(plan.folder):
            if not isinstance(opened, ShardReader):
                # Every tensor of a Hugging Face folder has a place in the model; none holds NaN.
                reader = model.account(opened)
                dtype = ", ".join(sorted({dtype_name(code) for code in opened.stored.values()}))
            needed = {part.name: part.global_shape for part in model.shards(optimizer=full)}
            whole = self._control.rank == 0  # which alone has the saved buffers
            plan.check_fits(reader, needed, model.architecture(), whole)
            if isinstance(opened, ShardReader) and not kept:
                model.check_finite(reader, full)
        plan.check_unchanged(mark)
        if not full:
            return _Saved(reader, dtype, {})
        state = plan.state()
        if missing := model.scalars().keys() - state["scalars"].keys():
            raise invalid(f"the state in {plan.folder} lacks {', '.join(sorted(missing))}")
        return _Saved(reader, dtype, state, self._usable_rng(plan))

    def _usable_rng(self, plan: LoadPlan) -> dict[str, Any] | None:
        """Tried before any weight changes."""
        rng = plan.rng(self._control.rank, self._control.size)
        if rng is not None:
            before = rng_state()
            try:
                set_rng_state(rng)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise invalid(f"{plan.folder} has no random state: {error}") from error
            finally:
                set_rng_state(before)
        return rng

    def _on_rank_0(self, act: Callable[[], Answer]) -> Answer | None:
        """What a vote gives of a local ``act`` of rank 0 alone."""
        return self._control.vote(act if self._control.rank == 0 else lambda: None)

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
            write_file(folder, SNAPSHOT_FILE, json.dumps(kept._asdict()).encode())
            former = at(folder).move(folder, state, replace=True)
            if former is not None:
                with contextlib.suppress(OSError):
                    at(folder).remove(former, recursive=True)

        self._on_rank_0(publish)

    def resume(self, model: TrainingState) -> Snapshot:
        """Load what :meth:`suspend` kept, if anything, and say what that is."""
        kept = self._control.vote(lambda: read_snapshot(self._folders.state))
        if kept.seq > 0:
            plan = self._control.vote(lambda: inspect(self._folders.state))
            self._load(model, plan, weight_only=False, kept=True)
        return kept

    def _suspended_manifest(self, folder: Path, seq: int) -> Manifest:
        return Manifest(
            identifier=self._name,
            job_id="suspended",
            step=0,
            seq=seq,
            world_size=self._control.size,
            config_hash=self._config_hash(),
            weight_only=False,
            created=time.time(),
            files=tuple(staged_files(folder, self._control.size)),
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


def empty_folder(folder: Path) -> None:
    """Make an empty folder; a second attempt at the same save finds nothing of the first."""
    with full_disk(folder):
        at(folder).remove(folder, recursive=True)
        at(folder).make(folder)
