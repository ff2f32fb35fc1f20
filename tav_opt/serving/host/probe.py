"""Whether a server really edits: a request that only a living worker can answer, refused by it within milliseconds.

Triton reports *live* and *ready* after its worker has died, and then fails every request; so neither proves anything.
A worker that is busy is not dead: the probe may have to wait for a long edit, and says so instead of raising an alarm.
Standard library only, so that a container's health check costs little more than the start of Python.
"""

from __future__ import annotations

import json
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import Literal

from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.loopback import urlopen

REQUEST_ID = "tav-opt-probe"
"""Of the probe's requests: the worker neither counts nor logs them."""

TIMEOUT_SECONDS = 4.0
"""With its worker dead Triton takes up to two seconds to say so."""
GATEWAY_SECONDS = 15.0
"""The gateway asks the worker itself, one at a time."""

Get = Callable[[str | urllib.request.Request], HTTPResponse]
"""Opens a URL, or sends a request."""

_COUNT = re.compile(r"^(nv_inference_(?:pending_request_count|request_failure))\{(.*)\} ([\d.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a probe found, and how it knows."""

    state: Literal["alive", "busy", "dead"]
    reason: str


def probe(http_url: str, metrics_url: str, *, timeout_s: float = TIMEOUT_SECONDS, direct: bool = False) -> Health:
    """Asks the server at `http_url` for an edit of a clip that cannot exist.

    alive: the worker refused it, quoting the name. busy: an edit runs or requests wait, and none fails. dead: nothing
    answers, or what answers is not the worker. Takes little more than `timeout_s` at most. While requests wait, no
    other is added: an abandoned one would keep its place in the queue, and many would fill it. A proxy is asked for
    remote addresses only, and for none that is `direct`. Raises InputError for what is no URL.
    """
    for url in (http_url, metrics_url):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no URL, e.g. http://localhost:8000")
    asked, get = metrics_url, partial(urlopen, timeout_s=timeout_s, direct=direct)
    try:
        waiting, failed = _counts(metrics_url, get)
        if waiting:
            time.sleep(min(2.5, timeout_s))
            return _while_waiting(waiting, _counts(metrics_url, get)[1] - failed)
        asked = http_url
        return _ask(http_url, get, timeout_s)
    except HTTPException as error:
        return Health(state="dead", reason=f"what {asked} answers is not to be read: {error!r}")
    except (OSError, ValueError) as error:
        return Health(state="dead", reason=f"nothing answers at {asked}: {error}")


def told(metrics_url: str) -> Health:
    """What the gateway tells of it beside its metrics page; raises InputError for what is no URL."""
    if not metrics_url.startswith(("http://", "https://")):
        raise InputError(f"{metrics_url!r} is no URL, e.g. http://localhost:8002/metrics")
    url = f"{metrics_url.rstrip('/').removesuffix('/metrics')}/health"
    try:
        with urlopen(url, GATEWAY_SECONDS) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code != 503:
            return Health(state="dead", reason=f"{url} says {error.code}: a server without gateway takes --http-url")
        found = json.loads(error.read())
    except (OSError, ValueError, HTTPException) as error:
        return Health(state="dead", reason=f"nothing answers at {url}: {error}")
    return Health(**found)


def _while_waiting(waiting: int, failed: int) -> Health:
    # With its worker dead Triton fails one waiting request a second, and counts it.
    if failed > 0:
        return Health(state="dead", reason=f"{failed} waiting requests failed in the backend")
    return Health(state="busy", reason=f"requests wait ({waiting}) and none fails")


def _ask(http_url: str, get: Get, timeout_s: float) -> Health:
    clip = f"probe-{secrets.token_hex(8)}"
    body = json.dumps({"id": REQUEST_ID, "clip": clip, "prompt": "probe"}).encode()
    url = f"{http_url}/v2/models/{STREAM_MODEL}/generate_stream"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with get(request) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as refusal:
        text = refusal.read().decode(errors="replace")
        if refusal.code == 503 and "queue" in text:
            return Health(state="busy", reason="the queue is full")
    except TimeoutError:
        return Health(state="busy", reason=f"an edit has been running for {timeout_s:g} s or more")
    if clip in text:
        return Health(state="alive", reason="the worker answered")
    return Health(state="dead", reason=_error(text))


def _counts(metrics_url: str, get: Get) -> tuple[int, int]:
    """Requests that wait for the streaming model, and those that failed for want of a worker."""
    with get(metrics_url) as answer:
        page = answer.read().decode()
    totals = {"nv_inference_pending_request_count": 0, "nv_inference_request_failure": 0}
    for name, labels, value in _COUNT.findall(page):
        if f'model="{STREAM_MODEL}"' in labels and ("reason=" not in labels or 'reason="BACKEND"' in labels):
            totals[name] += int(float(value))
    return totals["nv_inference_pending_request_count"], totals["nv_inference_request_failure"]


def _error(text: str) -> str:
    found = re.search(r'"error":"(.*?)"\}', text)
    return found[1] if found else f"an unexpected answer: {text[:200]!r}"
