"""Answers to the dicts that trainers get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tensor_codec
from nexrl_contract import envelope
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE

from ._tensors import data_to_tensor, frame_tensor
from ._transport import Response
from .errors import InvalidAnswer

_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def read_json(response: Response) -> dict[str, Any]:
    """The JSON object of an answer; raises InvalidAnswer."""
    try:
        body = json.loads(bytes(response.body))
    except (ValueError, RecursionError) as error:
        start = bytes(response.body[:100])
        raise InvalidAnswer(
            f"{response.source} answered what is no JSON ({start!r}...); is this the service's "
            "address?"
        ) from error
    if not isinstance(body, dict):
        raise InvalidAnswer(
            f"{response.source} answered a JSON {type(body).__name__}; is this the service's "
            "address?"
        )
    return body


def read_result(response: Response, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """An operation's answer. Of a batch operation {"batch", "metrics", "meta_info"}, of others
    their JSON object.

    meta_info["metrics"] is metrics; ignored joins what the service did not read; non-finite metrics
    are floats.
    """
    if response.headers.get("content-type", "").startswith(FRAME_TYPE):
        return _batch_result(*_read_frame(response), ignored)
    body = read_json(response)
    if "batch" not in body:
        return {**body, "metrics": to_floats(body["metrics"])} if "metrics" in body else body
    try:
        batch = {name: data_to_tensor(data) for name, data in (body["batch"] or {}).items()}
    except (tensor_codec.CodecError, AttributeError) as error:
        raise InvalidAnswer(f"the answer holds a broken tensor: {error}") from error
    return _batch_result(batch, body.get("metrics"), body.get("meta_info"), ignored)


def to_floats(value: Any) -> Any:
    """The same metrics with "NaN", "Infinity" and "-Infinity" as floats, at any depth."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [to_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: to_floats(item) for name, item in value.items()}
    return value


def _read_frame(response: Response) -> tuple[dict[str, Any], Any, Any]:
    try:
        frame = tensor_codec.wrap(response.body)
        if envelope.FRAME_METADATA_KEY not in frame.header.metadata:
            raise InvalidAnswer(
                f"{response.source} answered tensors alone; is this the service's address?"
            )
        described = envelope.read(frame.header.metadata)
        batch = {name: frame_tensor(frame, name) for name in frame.header.tensors}
        return batch, described.get("metrics"), described.get("meta_info")
    except (ValueError, ServiceError) as error:
        raise InvalidAnswer(f"the answer is a broken frame: {error}") from error


def _batch_result(
    batch: dict[str, Any], metrics: Any, meta_info: Any, ignored: tuple[str, ...]
) -> dict[str, Any]:
    meta = dict(meta_info) if isinstance(meta_info, Mapping) else {}
    floats = to_floats(metrics if metrics is not None else meta.get("metrics") or {})
    names = dict.fromkeys([*ignored, *(meta.get("ignored") or [])])
    return {
        "batch": batch,
        "metrics": floats,
        "meta_info": {**meta, "metrics": floats, "ignored": list(names)},
    }
