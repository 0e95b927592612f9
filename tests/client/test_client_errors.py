"""The error tree: complete, picklable, and caught by those who catch requests' exceptions."""

from __future__ import annotations

import inspect
import pickle
import re

import nexrl_client.errors as tree
import pytest
import requests
from nexrl_client import (
    HTTPTrainServiceClient,
    JobHandle,
    NexRLError,
    ServiceFault,
    StatusError,
    testing,
)
from nexrl_contract.errors import ERRORS

CLASSES = [getattr(tree, name) for name in tree.__all__]


def refusal(code: str, **details: object) -> StatusError:
    """The exception that a client raises for a code."""
    transport = testing.ScriptedTransport([testing.error_response(code, "because", **details)])
    client = HTTPTrainServiceClient(transport=transport, request_timeout=0)
    with pytest.raises(StatusError) as caught:
        client.barrier()
    return caught.value


@pytest.mark.parametrize("code", ERRORS)
def test_every_code_has_a_class(code: str) -> None:
    """Each code of the service raises a class of its own, with the code's status."""
    error = refusal(code, identifier="student", job_id="j1", rank=2, tensor="input_ids")
    assert type(error).default_code == error.code == code
    assert error.status == ERRORS[code].status
    assert (error.message, error.identifier, error.job_id, error.rank) == (
        "because",
        "student",
        "j1",
        2,
    )
    assert error.details["tensor"] == "input_ids"
    assert error.details["retryable"] is ERRORS[code].retryable
    assert all(part in str(error) for part in (code, "because", "student", "j1", "rank=2"))


def test_classes_have_different_codes() -> None:
    """No two status errors answer to one code, and none to a code that is not in the table."""
    codes = [
        kind.default_code for kind in CLASSES if issubclass(kind, StatusError) and kind.default_code
    ]
    assert sorted(codes) == sorted(ERRORS)


def test_drawing_shows_every_class() -> None:
    """The tree in the docstring names exactly the classes there are."""
    drawn = {
        word
        for line in (tree.__doc__ or "").splitlines()
        for word in re.findall(r"\b[A-Z]\w+", _before_remark(line))
    }
    assert drawn == set(tree.__all__)


def _before_remark(line: str) -> str:
    if line != "NexRLError" and "── " not in line:
        return ""
    names = re.match(r"[\s│├└─]*((?:\w+, )*\w+)", line)
    return names.group(1) if names else ""


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[NexRLError]) -> None:
    """A pickled error, as process pools send it, is the same error with everything it carried."""
    client = HTTPTrainServiceClient("http://gateway:8000", "student")
    job = JobHandle("j1", "update_actor", client, ("prompts",))
    error = kind(
        "why",
        code="X",
        status=409,
        identifier="student",
        job_id="j1",
        rank=3,
        details={"key": "lr"},
        job=job,
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    for name in ("message", "code", "status", "identifier", "job_id", "rank", "details"):
        assert getattr(copy, name) == getattr(error, name)
    assert str(copy) == str(error)
    assert copy.job is not None
    assert (copy.job.id, copy.job.operation, copy.job.ignored) == (
        "j1",
        "update_actor",
        ("prompts",),
    )


def test_faults_are_requests_exceptions() -> None:
    """Whatever is the network's or the service's fault is caught as before; misuse is a ValueError
    and is not."""
    for kind in CLASSES:
        if kind is NexRLError:
            continue
        assert issubclass(kind, requests.exceptions.RequestException) == issubclass(
            kind, ServiceFault
        )
        assert issubclass(kind, ValueError) != issubclass(kind, ServiceFault)
    assert issubclass(tree.ServiceTimeout, requests.exceptions.Timeout)
    assert issubclass(tree.Unreachable, requests.exceptions.ConnectionError)
    assert issubclass(tree.GroupNotFound, requests.exceptions.HTTPError)


def test_unknown_code_is_the_class_of_its_status() -> None:
    """A code of a newer service still is an error of the right kind, with its code."""
    for status, kind in ((418, tree.Rejected), (500, tree.Failed), (503, tree.Unavailable)):
        answer = testing.json_response({"error": {"code": "BRAND_NEW", "message": "hm"}}, status)
        client = HTTPTrainServiceClient(
            transport=testing.ScriptedTransport([answer]), request_timeout=0
        )
        with pytest.raises(StatusError) as caught:
            client.barrier()
        assert (type(caught.value), caught.value.code, caught.value.status) == (
            kind,
            "BRAND_NEW",
            status,
        )


def test_every_class_says_what_it_means() -> None:
    """All classes have a docstring of their own."""
    assert [
        kind for kind in CLASSES if not kind.__dict__.get("__doc__") or not inspect.getdoc(kind)
    ] == []
