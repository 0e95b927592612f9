"""Whether a folder holds a model that a role can run.

``python -m nexrl_worker.rank.model_folder`` finds out while ranks start.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.errors import ServiceError
from safetensors import SafetensorError

from nexrl_worker.settings import GroupFolders
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.build import check_build, model_config
from nexrl_worker.training.model.quantised import method_of, quantisation
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.model.weights import open_weights, weight_files, what_is_wrong

_LONGEST_REASON = 600
_log = logging.getLogger(__name__)


def check_model_folder(path: str, role: str, key: str = "actor.model.path") -> None:
    """Raises ``INVALID_CONFIG`` saying what is missing, unreadable or no model for the role. Reads
    no weights."""
    with config_errors(path, key):
        _check(path)
        role_of(role).check(model_config(path))


def check_models(role: str, actor: dict[str, Any]) -> None:
    """Check the folders of a group's settings, and that their models can be built; needs a process
    group of one."""
    reference = actor["ref"]["model"]["path"] if role == "actor" else None
    for key, path, holder in (
        ("actor.model.path", actor["model"]["path"], role),
        ("actor.ref.model.path", reference, "ref"),
    ):
        if path is not None:
            check_model_folder(path, holder, key)
            with config_errors(path, key):
                check_build(path, role_of(holder))


@contextmanager
def config_errors(path: str, key: str) -> Iterator[None]:
    """Whatever a folder makes transformers, safetensors and our own model code raise is
    ``INVALID_CONFIG`` of ``key``, in a line."""
    try:
        yield
    except ServiceError as error:
        raise ServiceError(error.code, error.message, **{**error.details, "key": key}) from error
    except (MemoryError, torch.OutOfMemoryError, dist.DistError):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, InvalidValue) else f"{type(error).__name__}: {error}"
        reason = " ".join(text.split())[:_LONGEST_REASON]
        message = f"{key}: the {_family(path)}model in {path} cannot be used: {reason}"
        if not isinstance(error, (InvalidValue, OSError, SafetensorError)):
            _log.warning("model.refused %s", path, exc_info=True)
        known = error.details() if isinstance(error, InvalidValue) else {}
        raise ServiceError("INVALID_CONFIG", message, **{**known, "key": key}) from error


def _family(path: str) -> str:
    try:
        return f"{json.loads((Path(path) / 'config.json').read_bytes())['model_type']} "
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _check(path: str) -> None:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InvalidValue("there is no config.json, so it is no Hugging Face model folder")
    for file in (
        folder / "config.json",
        *sorted(folder.glob("*tokenizer*")),
    ):  # what an export takes along
        if file.is_file() and (wrong := what_is_wrong(file)):
            raise InvalidValue(f"{file} cannot be read: {wrong}")
    for name in weight_files(folder):
        open_weights(folder / name)
    said = quantisation(folder)
    if said is not None:
        method_of(said)


def main() -> None:
    """Check the group of ``NEXRL_GROUP``, and leave word where its models cannot be run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    group = json.loads(os.environ["NEXRL_GROUP"])
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not say that it exports it
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check_models(group["role"], group["config"])
    except ServiceError as error:
        GroupFolders(Path(group["data"]), group["identifier"]).channel.tell_refused(error.body())
    os._exit(0)  # the process group's threads have nothing to say


if __name__ == "__main__":
    main()
