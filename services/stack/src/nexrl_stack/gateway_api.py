"""What the read-only commands ask the gateway."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import urlsplit

import requests
from nexrl_contract.names import is_loopback, without_password
from requests.utils import get_environ_proxies, select_proxy

_TIMEOUT_S = 10.0
# More than a queue can hold, so no unfinished job of a group is missed.
_RECENT_JOBS = 100


class GatewayError(Exception):
    """The gateway cannot be reached, or refused; the message says what to do."""


def fetch_status(url: str) -> dict[str, Any]:
    """What ``/health`` says, and under ``groups`` each living group with its running and queued
    operations."""
    response = _send(url, "/health", {})
    if response.status_code not in (200, 503):
        raise _refusal(response)
    health = _json(response)
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
        running = [
            {"id": job["id"], "operation": job["operation"]}
            for job in jobs
            if job["state"] == "running"
        ]
        queued = sum(job["state"] == "queued" for job in jobs)
        groups.append(
            {
                "identifier": identifier,
                **model,
                "running": running[0] if running else None,
                "queued": queued,
            }
        )
    return groups


def _get(url: str, path: str, params: dict[str, str | int] | None = None) -> dict[str, Any]:
    response = _send(url, path, params or {})
    if response.status_code != 200:
        raise _refusal(response)
    return _json(response)


def _send(url: str, path: str, params: dict[str, str | int]) -> requests.Response:
    whole = url if "://" in url else f"http://{url}"
    by = ""
    try:
        proxy = _proxy(whole)
        by = f" by way of the proxy {proxy}" if proxy else ""
        with requests.Session() as session:
            session.trust_env = not is_loopback(urlsplit(whole).hostname or "")
            return session.get(f"{whole.rstrip('/')}{path}", params=params, timeout=_TIMEOUT_S)
    except requests.exceptions.ProxyError:
        raise GatewayError(
            f"{url} is not reached{by}: it is away, or refuses; NO_PROXY names what needs none"
        ) from None
    except requests.ConnectionError:
        raise GatewayError(
            f"no gateway answers at {url}{by}; start one with `nexrl up`, or give another --url"
        ) from None
    except requests.Timeout:
        raise GatewayError(
            f"the gateway at {url} did not answer within {_TIMEOUT_S:g} s{by}; its log says why"
        ) from None
    except (requests.RequestException, ValueError) as error:
        raise GatewayError(f"{url} cannot be asked{by}: {error}") from error


def _proxy(url: str) -> str | None:
    """The proxy that the environment sets for ``url``; this machine itself needs none, whatever is
    set."""
    if is_loopback(urlsplit(url).hostname or ""):
        return None
    proxy = select_proxy(url, get_environ_proxies(url))
    return without_password(proxy) if proxy else None


def _refusal(response: requests.Response) -> GatewayError:
    try:
        error = response.json()["error"]
        return GatewayError(f"{error['code']}: {error['message']}")
    except (ValueError, KeyError, TypeError):
        answered = f"{_answerer(response)} answered {response.status_code} and is no NexRL gateway"
        return GatewayError(f"{answered}; give another --url")


def _json(response: requests.Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return body
    raise GatewayError(f"{_answerer(response)} is no NexRL gateway; give another --url")


def _answerer(response: requests.Response) -> str:
    proxy = _proxy(response.url)
    return f"the proxy {proxy}, asked for {response.url}," if proxy else response.url
