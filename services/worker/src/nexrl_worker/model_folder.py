"""Whether a folder holds a model that can be built, found out before any rank enters a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexrl_contract.errors import ServiceError
from safetensors import SafetensorError
from transformers import AutoConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.quantised import method_of, quantisation
from nexrl_worker.training.weights import open_weights, weight_files, what_is_wrong


def check_model_folder(path: str, key: str = "actor.model.path") -> None:
    """Raises ``INVALID_CONFIG`` saying what is missing, unreadable or not understood. Reads configuration and headers, no weights."""
    with config_errors(path, key):
        _check(path)


@contextmanager
def config_errors(path: str, key: str) -> Iterator[None]:
    """What a folder's files make transformers, safetensors and our own model code raise is ``INVALID_CONFIG`` of ``key``."""
    try:
        yield
    except ServiceError as error:
        raise ServiceError(error.code, error.message, **{**error.details, "key": key}) from error
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        text = str(error) or type(error).__name__
        known = error.details() if isinstance(error, InvalidValue) else {}
        message = f"the model in {path} cannot be built: {text}"
        raise ServiceError("INVALID_CONFIG", message, **{**known, "key": key}) from error


def _check(path: str) -> None:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise _refused(f"{path} has no config.json: it is no Hugging Face model folder")
    if wrong := what_is_wrong(folder / "config.json"):
        raise _refused(f"{path}/config.json cannot be read: {wrong}")
    try:
        for name in weight_files(folder):
            open_weights(folder / name)
        said = quantisation(folder)
        if said is not None:
            method_of(said)
    except InvalidValue as error:
        raise _refused(error.message) from error
    try:
        AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise _refused(f"{path}/config.json is not understood: {error}") from error


def _refused(message: str) -> ServiceError:
    return ServiceError("INVALID_CONFIG", message)
