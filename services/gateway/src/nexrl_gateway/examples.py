"""The request bodies that the OpenAPI page shows; a test sends each of them to a real gateway."""

from __future__ import annotations

import struct
from typing import Any

from nexrl_contract.names import FRAME_TYPE, JSON_TYPE
from nexrl_contract.operations import Operation
from tensor_codec import RawTensor, to_json

B, S, R = 2, 4, 2
PATH = "/models/tiny"

GROUP: dict[str, Any] = {
    "config_dict": {"actor": {"model": {"path": PATH}, "optim": {"lr": 1e-3}}},
    "role": "actor",
    "world_size": 2,
}
PARTS: dict[str, Any] = {"payload": "0123456789abcdef0123456789abcdef", "parts": 3}


def _integers(*values: int, width: int) -> Any:
    return to_json(RawTensor("I64", (len(values) // width, width), struct.pack(f"<{len(values)}q", *values)))


def floats(*values: float, width: int | None = None) -> Any:
    """A JSON tensor of float32 numbers, ``[len(values)]`` or, with a width, ``[len(values) // width, width]``."""
    shape = (len(values),) if width is None else (len(values) // width, width)
    return to_json(RawTensor("F32", shape, struct.pack(f"<{len(values)}f", *values)))


TENSORS: dict[str, Any] = {
    "input_ids": _integers(5, 6, 7, 8, 5, 6, 9, 8, width=S),
    "attention_mask": _integers(*[1] * B * S, width=S),
    "responses": _integers(7, 8, 9, 8, width=R),
    "advantages": floats(0.5, 0.5, -0.5, -0.5, width=R),
    "old_log_probs": floats(-1.0, -1.2, -0.9, -1.1, width=R),
    "ref_log_prob": floats(-1.1, -1.2, -1.0, -1.1, width=R),
    "teacher_log_probs": floats(-0.8, -1.0, -1.5, -1.0, width=R),
    "values": floats(0.1, 0.2, 0.1, 0.3, width=R),
    "returns": floats(1.0, 1.0, 0.0, 0.0, width=R),
    "rewards": floats(0.7, -0.2),
}
"""Of two rows of four tokens, the last two being the response."""
_WITHOUT_A_KL_TERM = ("ref_log_prob",)


def batch_example(operation: Operation) -> dict[str, Any]:
    """What the operation reads in a group of the default configuration."""
    read = (name for name in operation.reads if name in TENSORS and name not in _WITHOUT_A_KL_TERM)
    return {"tensors": {name: TENSORS[name] for name in read}, "metadata": {"temperature": 1.0}}


def request_body(operation: Operation) -> dict[str, Any]:
    """OpenAPI's description of what the operation takes."""
    schema = operation.params.model_json_schema()
    if not operation.takes_batch:
        example = {name: info.examples[0] for name, info in operation.params.model_fields.items() if info.examples}
        return {"content": {JSON_TYPE: {"schema": schema, "examples": {"typical": {"value": example}}}}}
    schema = {**schema, "additionalProperties": True}
    examples = {
        "tensors": {"summary": "Tensors as base64", "value": batch_example(operation)},
        "parts": {"summary": "After PUT /payloads/{payload}/parts/0, 1, 2", "value": PARTS},
    }
    frame = {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "A safetensors file; see libs/tensor_codec/SPEC.md",
        }
    }
    return {"required": True, "content": {JSON_TYPE: {"schema": schema, "examples": examples}, FRAME_TYPE: frame}}
