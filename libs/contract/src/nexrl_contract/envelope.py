"""What travels in a frame beside its tensors: JSON under one key of the safetensors metadata, with
a version.

A request has the batch's ``metadata`` and the operation's ``params``; a result has ``metrics``,
``meta_info`` and whatever else the operation answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nexrl_contract.errors import ServiceError

FRAME_METADATA_KEY = "nexrl"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Envelope:
    """What travels beside the tensors of a request."""

    metadata: dict[str, Any]
    params: dict[str, Any]

    def frame_metadata(self) -> dict[str, str]:
        """The metadata of the frame that carries it; the same request has the same bytes."""
        return written({"metadata": self.metadata, "params": self.params})

    @classmethod
    def read(
        cls, frame_metadata: Mapping[str, str], loads: Callable[[str], Any] = json.loads
    ) -> Envelope:
        """That of a frame, empty for a plain safetensors file; raises MALFORMED and what ``loads``
        raises."""
        document = read(frame_metadata, loads)
        metadata, params = document.get("metadata") or {}, document.get("params") or {}
        if not isinstance(metadata, dict) or not isinstance(params, dict):
            raise ServiceError("MALFORMED", "the frame's metadata and params must be objects")
        return cls(metadata, params)


def written(document: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a frame that carries ``document``."""
    text = json.dumps({"version": VERSION, **document}, sort_keys=True, separators=(",", ":"))
    return {FRAME_METADATA_KEY: text}


def read(
    frame_metadata: Mapping[str, str], loads: Callable[[str], Any] = json.loads
) -> dict[str, Any]:
    """What :func:`written` wrote, {} for a plain safetensors file; raises MALFORMED for another
    version."""
    if FRAME_METADATA_KEY not in frame_metadata:
        return {}
    document = loads(frame_metadata[FRAME_METADATA_KEY])
    if not isinstance(document, dict) or document.pop("version", None) != VERSION:
        message = (
            f"the frame's {FRAME_METADATA_KEY} metadata must be an object of version {VERSION}"
        )
        raise ServiceError("MALFORMED", message)
    return document
