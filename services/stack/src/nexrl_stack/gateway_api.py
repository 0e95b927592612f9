"""What the read-only commands ask the gateway."""

from __future__ import annotations

from typing import Any

import requests

_TIMEOUT_S = 10.0
# More than a queue can hold, so no unfinished job of a group is missed.
_RECENT_JOBS = 100


class GatewayError(Exception):
    """The gateway cannot be reached, or refused; the message says what to do."""


def fetch_status(url: str) -> dict[str, Any]:
    """What ``/health`` says, and under ``groups`` each living group with its running and queued operations."""
    response = _send(url, "/health", {})
    if response.status_code not in (200, 503):
        raise _refusal(url, response)
    health = _json(url, response)
    # 503 is the report that Redis or the payload store is away: nobody knows the groups then.
    groups = _fetch_groups(url) if response.status_code == 200 else []
    return {"url": url, **health, "groups": groups}


def fetch_jobs(url: str, identifier: str | None, limit: int) -> list[dict[str, Any]]:
    """Job views, newest first."""
    params: dict[str, str | int] = {"limit": limit}
    if identifier is not None:
        params["identifier"] = identifier
    jobs: list[dict[str, Any]] = _get(url, "/jobs", params)["jobs"]
    return jobs


def _fetch_groups(url: str) -> list[dict[str, Any]]:
    groups = []
    for identifier, model in sorted(_get(url, "/get_models")["models"].items()):
        jobs = fetch_jobs(url, identifier, _RECENT_JOBS)
        running = [{"id": job["id"], "operation": job["operation"]} for job in jobs if job["state"] == "running"]
        queued = sum(job["state"] == "queued" for job in jobs)
        groups.append({"identifier": identifier, **model, "running": running[0] if running else None, "queued": queued})
    return groups


def _get(url: str, path: str, params: dict[str, str | int] | None = None) -> dict[str, Any]:
    response = _send(url, path, params or {})
    if response.status_code != 200:
        raise _refusal(url, response)
    return _json(url, response)


def _send(url: str, path: str, params: dict[str, str | int]) -> requests.Response:
    try:
        return requests.get(f"{url.rstrip('/')}{path}", params=params, timeout=_TIMEOUT_S)
    except requests.ConnectionError:
        raise GatewayError(f"no gateway answers at {url}; start one with `nexrl up`, or give another --url") from None
    except requests.Timeout:
        raise GatewayError(f"the gateway at {url} did not answer within {_TIMEOUT_S:g} s; its log says why") from None
    except requests.RequestException as error:
        raise GatewayError(f"{url} cannot be asked: {error}") from error


def _refusal(url: str, response: requests.Response) -> GatewayError:
    try:
        error = response.json()["error"]
        return GatewayError(f"{error['code']}: {error['message']}")
    except (ValueError, KeyError, TypeError):
        return GatewayError(f"{url} answered {response.status_code} and is no NexRL gateway; give another --url")


def _json(url: str, response: requests.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        raise GatewayError(f"{url} is no NexRL gateway; give another --url") from None
    return body
