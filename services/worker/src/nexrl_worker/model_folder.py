"""Whether a folder holds a model that can be built, found out before any rank enters a collective."""

from __future__ import annotations

from pathlib import Path

from nexrl_contract.errors import ServiceError
from transformers import AutoConfig


def check_model_folder(path: str) -> None:
    """Raises ``INVALID_CONFIG`` saying what is missing or not understood. Reads the configuration, no weights."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ServiceError(
            "INVALID_CONFIG", f"{path} has no config.json: it is no Hugging Face model folder", key="actor.model.path"
        )
    if not any(folder.glob("*.safetensors")):
        raise ServiceError(
            "INVALID_CONFIG",
            f"{path} has no .safetensors file; other weight formats are not read",
            key="actor.model.path",
        )
    try:
        AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ServiceError(
            "INVALID_CONFIG", f"{path}/config.json is not understood: {error}", key="actor.model.path"
        ) from error
