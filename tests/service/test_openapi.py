"""What the OpenAPI page shows as answers, and the models it is made of, are what a group of real
ranks answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import requests
from nexrl_client import HTTPTrainServiceClient
from nexrl_contract.operations import OPERATIONS
from nexrl_gateway.openapi import ANSWERS

from tests.helpers.gateway import keys_of
from tests.helpers.stack import Stack

_OPEN = ("metrics", "config")
"""Their keys depend on the configuration: an example shows some of them."""


def test_the_answers_shown_have_the_keys_of_real_ones(
    student: HTTPTrainServiceClient, stack: Stack, tiny_model: Path, tmp_path: Path
) -> None:
    """Every request of the page, sent as it stands to a group of actors; then the service's own
    reports."""
    paths = requests.get(f"{stack.url}/openapi.json", timeout=30).json()["paths"]
    for name, operation in OPERATIONS.items():
        if "actor" not in operation.roles or not operation.by_ranks:
            continue
        content = paths[f"/{name}"]["post"]["requestBody"]["content"]["application/json"][
            "examples"
        ]
        request = content["tensors" if operation.takes_batch else "typical"]["value"]
        text = json.dumps(request).replace("ckpt/step_1", f"openapi/{tmp_path.name}")
        answer = call(stack, student, "POST", f"/{name}", json=json.loads(text))
        ANSWERS[name].model_validate_json(json.dumps(answer), strict=True)
        assert_as_shown(paths, f"/{name}", answer)
    config = {"actor": {"model": {"path": str(tiny_model)}, "optim": {"lr": 1e-3}}}
    found = call(
        stack, student, "POST", "/initialize", json={"config_dict": config, "world_size": 2}
    )
    ANSWERS["initialize_worker"].model_validate_json(json.dumps(found), strict=True)
    assert_as_shown(paths, "/initialize", found)
    for path in ("/health", "/ready", "/worker_info", "/jobs"):
        assert_as_shown(paths, path, call(stack, student, "GET", path), "get")


def call(
    stack: Stack, student: HTTPTrainServiceClient, method: str, path: str, **options: Any
) -> Any:
    query = {"identifier": student.identifier}
    response = requests.request(method, f"{stack.url}{path}", params=query, timeout=60, **options)
    assert response.status_code == 200, response.text
    return response.json()


def assert_as_shown(paths: Any, path: str, real: Any, method: str = "post") -> None:
    shown = paths[path][method]["responses"]["200"]["content"]["application/json"]["example"]
    for part in _OPEN:
        for one, other in ((shown, real), (shown.get("meta_info", {}), real.get("meta_info", {}))):
            assert one.pop(part, {}).keys() <= other.pop(part, {}).keys(), (path, part)
    for document in (shown, real):
        for kind in ("groups", "models"):  # the groups of other tests too
            document[kind] = list(document.pop(kind, {}).values())
    assert keys_of(real) == keys_of(shown), path
