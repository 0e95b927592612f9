"""The OpenAPI page, made of the rows of operations, tensors and errors and of the answers' models:
what routes take, answer and refuse, and an example of each, made of its schema."""

from __future__ import annotations

import struct
from collections import defaultdict
from functools import reduce
from operator import or_
from typing import Any

from nexrl_contract.batch import answers_of, reads_of
from nexrl_contract.errors import ERRORS, RETRY_AFTER_S, ServiceError
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE
from nexrl_contract.operations import OPERATIONS, SCORED, Operation
from nexrl_contract.results import JOB_ID, JSONTensor
from nexrl_contract.sections import ActorConfig
from nexrl_contract.tensors import TENSORS, B
from pydantic import BaseModel, Field, create_model
from tensor_codec import RawTensor, to_json

from nexrl_gateway.responses import ErrorBody, JobView
from nexrl_gateway.strict_json import JSON

Responses = dict[int | str, JSON]

_CODES: defaultdict[int, list[str]] = defaultdict(list)
for _code, _kind in ERRORS.items():
    _CODES[_kind.status].append(_code)
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds until the next try.",
        "schema": {"type": "integer"},
        "example": RETRY_AFTER_S,
    }
}
_FRAME = {
    FRAME_TYPE: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": f"With `Accept: {FRAME_TYPE}`, where the result has tensors: a "
            "safetensors file of `batch`, with `metrics` and `meta_info` as JSON under `nexrl` in "
            "its metadata.",
        }
    }
}


def _integers(*values: int, width: int) -> Any:
    data = struct.pack(f"<{len(values)}q", *values)
    return to_json(RawTensor("I64", (len(values) // width, width), data))


def _floats(*values: float, width: int | None = None) -> Any:
    shape = (len(values),) if width is None else (len(values) // width, width)
    return to_json(RawTensor("F32", shape, struct.pack(f"<{len(values)}f", *values)))


_TENSORS: JSON = {
    "input_ids": _integers(5, 6, 7, 8, 5, 6, 9, 8, width=4),
    "attention_mask": _integers(*[1] * 8, width=4),
    "responses": _integers(7, 8, 9, 8, width=2),
    "advantages": _floats(0.5, 0.5, -0.5, -0.5, width=2),
    "old_log_probs": _floats(-1.0, -1.2, -0.9, -1.1, width=2),
    "ref_log_prob": _floats(-1.1, -1.2, -1.0, -1.1, width=2),
    "teacher_log_probs": _floats(-0.8, -1.0, -1.5, -1.0, width=2),
    "values": _floats(0.1, 0.2, 0.1, 0.3, width=2),
    "returns": _floats(1.0, 1.0, 0.0, 0.0, width=2),
    "rewards": _floats(0.7, -0.2),
}
"""Of two rows of four tokens, the last two being the response."""
_DEFAULT = ActorConfig.model_validate({"model": {"path": "/models/tiny"}})


def request_body(operation: Operation) -> JSON:
    """What the operation takes, with requests that may be sent as they are: a batch is what it
    reads in a group of the default configuration."""
    schema = operation.params.model_json_schema()
    if not operation.takes_batch:
        fields = operation.params.model_fields.items()
        example = {name: info.examples[0] for name, info in fields if info.examples}
        examples: JSON = {"typical": {"value": example}}
        content = {JSON_TYPE: {"schema": schema, "examples": examples}}
        return {"required": bool(example), "content": content}
    loss = reads_of(operation, {}, _DEFAULT, _TENSORS)
    read = {*SCORED, *loss.required, *loss.optional}
    tensors = {name: _TENSORS[name] for name in operation.reads if name in _TENSORS.keys() & read}
    batch = {"tensors": tensors, "metadata": {"temperature": 1.0}}
    parts = {"payload": "0123456789abcdef0123456789abcdef", "parts": 3}
    examples = {
        "tensors": {"summary": "Tensors as base64", "value": batch},
        "parts": {"summary": "After PUT /payloads/{payload}/parts/0, 1, 2", "value": parts},
    }
    description = "A safetensors file; see libs/tensor_codec/SPEC.md"
    frame = {"type": "string", "format": "binary", "description": description}
    tensor = {name: {"type": "object", "description": _described(name)} for name in operation.reads}
    described = {"type": "object", "properties": tensor, "required": [*operation.required]}
    properties = {**schema["properties"], "tensors": described}
    json = {**schema, "properties": properties, "additionalProperties": True}
    content = {JSON_TYPE: {"schema": json, "examples": examples}, FRAME_TYPE: {"schema": frame}}
    return {"required": True, "content": content}


def _example_of(answered: str) -> JSON:
    """A tensor of an answer: the example batch's of that name, else halves in its row's shape."""
    width = None if TENSORS[answered].shapes == (B,) else 2
    found: JSON = _TENSORS.get(answered) or _floats(*[0.5] * (width or 1) * 2, width=width)
    return found


def _described(tensor: str) -> str:
    spec = TENSORS[tensor]
    return f"{' or '.join(spec.shapes)}, {spec.values}. {spec.meaning}."


def answer_model(operation: Operation) -> type[BaseModel]:
    """What the operation answers as JSON: the row's model, with the row's tensors in its batch."""
    if not operation.takes_batch:
        return operation.answer
    name = operation.name.title().replace("_", "")
    always = answers_of(operation, {}, None)
    tensors: JSON = {}
    for tensor in operation.answers:
        described = f"{TENSORS[tensor].answered} {TENSORS[tensor].meaning}."
        if tensor in always:
            shown = Field(description=described, examples=[_example_of(tensor)])
            tensors[tensor] = (JSONTensor, shown)
        else:
            tensors[tensor] = (JSONTensor | None, Field(None, description=described))
    batch = create_model(f"{name}Batch", **tensors)
    doc = operation.answer.__doc__
    return create_model(f"{name}Answer", __base__=operation.answer, __doc__=doc, batch=(batch, ...))


ANSWERS = {name: answer_model(row) for name, row in OPERATIONS.items()}
"""By operation."""


def answered(model: Any, status: int = 200, description: str = "Done") -> Responses:
    """The ``responses`` of a route that answers such JSON."""
    return {status: {"model": model, "description": description}}


def unavailable(model: type[BaseModel]) -> Responses:
    """503 of a route that reports on the service, whose answer is no error."""
    described = "Redis or the payload store is away"
    return {503: {"model": model, "description": described, "headers": _RETRY_AFTER}}


def operation_responses(operation: Operation) -> Responses:
    """What an operation answers when it is done, and when it is a job that goes on."""
    done = answered(ANSWERS[operation.name])
    if operation.takes_batch:
        done[200]["content"] = _FRAME
    where = {
        "description": "Where to ask for the job.",
        "schema": {"type": "string"},
        "example": f"/jobs/{JOB_ID}",
    }
    applied = {"schema": {"type": "string"}, "example": "respond-async"}
    accepted = {
        "model": JobView,
        "description": "Accepted: the job, when the request prefers respond-async",
        "headers": {"Location": where, "Preference-Applied": applied},
    }
    return {**done, 202: accepted}


def result_responses() -> Responses:
    """What any operation has answered: the same as from the operation itself."""
    any_answer: Any = reduce(or_, ANSWERS.values())
    return {200: {"model": any_answer, "description": "Done", "content": _FRAME}}


def refused(*statuses: int) -> Responses:
    """The ``responses`` of a route that may refuse with these statuses; 503 always."""
    return {status: _refusal(status) for status in (*statuses, 503)}


def _refusal(status: int) -> JSON:
    described = "; ".join(f"{code}: {ERRORS[code].meaning}" for code in _CODES[status])
    headers = {"headers": _RETRY_AFTER} if status in (429, 503) else {}
    body = {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}  # of /metrics too
    return {"model": ErrorBody, "description": described, "content": body, **headers}


def with_examples(page: JSON) -> JSON:
    """The page with an example of each JSON answer, and one of each code that a status may mean."""
    schemas = page["components"]["schemas"]
    for methods in page["paths"].values():
        for operation in methods.values():
            named = {"operation": row} if (row := operation["operationId"]) in OPERATIONS else {}
            for status, response in operation["responses"].items():
                content = response.get("content", {}).get(JSON_TYPE, {"schema": {}})
                if content["schema"].get("$ref", "").endswith("/ErrorBody"):
                    content["examples"] = {
                        code: {"value": {"error": ServiceError(code, ERRORS[code].meaning).body()}}
                        for code in _CODES[int(status)]
                    }
                elif content["schema"]:
                    content["example"] = _example(content["schema"], schemas, named)
    return page


_SIMPLE = {"string": "text", "integer": 1, "number": 0.5, "boolean": False, "null": None}


def _example(schema: JSON, schemas: JSON, named: JSON) -> Any:
    """A value that the schema allows: its first example, else the least; ``named`` are values of
    properties."""
    match schema:
        case {"examples": [first, *_]} | {"const": first} | {"enum": [first, *_]}:
            return first
        case {"$ref": reference}:
            return _example(schemas[reference.rpartition("/")[2]], schemas, named)
        case {"anyOf": [*forms]}:
            return None if {"type": "null"} in forms else _example(forms[0], schemas, named)
        case {"type": "object", "properties": properties}:
            shown = {*schema.get("required", ())}
            return {
                name: named.get(name) or _example(inner, schemas, named)
                for name, inner in properties.items()
                if name in shown or "examples" in inner
            }
        case {"type": "object", "additionalProperties": {"$ref": _} as inner}:
            return {"student": _example(inner, schemas, named)}
        case {"type": "array", "items": {"$ref": _} as inner}:
            return [_example(inner, schemas, named)]
        case {"type": "object"}:
            return {}
        case {"type": "array"}:
            return []
    return _SIMPLE[schema["type"]]
