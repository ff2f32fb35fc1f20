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
from dataclasses import dataclass
from typing import Literal

from tav_opt.contract import STREAM_MODEL

REQUEST_ID = "tav-opt-probe"
"""Of the probe's requests: the worker neither counts nor logs them."""

_COUNT = re.compile(r"^(nv_inference_(?:pending_request_count|request_failure))\{(.*)\} ([\d.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a probe found, and how it knows."""

    state: Literal["alive", "busy", "dead"]
    reason: str


def probe(http_url: str, metrics_url: str, *, timeout_s: float = 5.0) -> Health:
    """Asks the server at `http_url` for an edit of a clip that cannot exist.

    alive: the worker refused it, quoting the name. busy: an edit runs or requests wait, and none fails. dead: nothing
    answers, or what answers is not the worker. Takes little more than `timeout_s` at most. While requests wait, no
    other is added: an abandoned one would keep its place in the queue, and many would fill it.
    """
    asked = metrics_url
    try:
        waiting, failed = _counts(metrics_url, timeout_s)
        if waiting:
            return _while_waiting(waiting, failed, metrics_url, timeout_s)
        asked = http_url
        return _ask(http_url, timeout_s)
    except (OSError, ValueError) as error:
        return Health(state="dead", reason=f"nothing answers at {asked}: {error}")


def _while_waiting(waiting: int, failed: int, metrics_url: str, timeout_s: float) -> Health:
    # With its worker dead Triton fails one waiting request a second, and counts it.
    time.sleep(min(2.5, timeout_s))
    after = _counts(metrics_url, timeout_s)[1]
    if after > failed:
        return Health(state="dead", reason=f"{after - failed} waiting requests failed in the backend")
    return Health(state="busy", reason=f"requests wait ({waiting}) and none fails")


def _ask(http_url: str, timeout_s: float) -> Health:
    clip = f"probe-{secrets.token_hex(8)}"
    body = json.dumps({"id": REQUEST_ID, "clip": clip, "prompt": "probe"}).encode()
    url = f"{http_url}/v2/models/{STREAM_MODEL}/generate_stream"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
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


def _counts(metrics_url: str, timeout_s: float) -> tuple[int, int]:
    """Requests that wait for the streaming model, and those that failed for want of a worker."""
    with urllib.request.urlopen(metrics_url, timeout=timeout_s) as answer:
        page = answer.read().decode()
    totals = {"nv_inference_pending_request_count": 0, "nv_inference_request_failure": 0}
    for name, labels, value in _COUNT.findall(page):
        if f'model="{STREAM_MODEL}"' in labels and ("reason=" not in labels or 'reason="BACKEND"' in labels):
            totals[name] += int(float(value))
    return totals["nv_inference_pending_request_count"], totals["nv_inference_request_failure"]


def _error(text: str) -> str:
    found = re.search(r'"error":"(.*?)"\}', text)
    return found[1] if found else f"an unexpected answer: {text[:200]!r}"
