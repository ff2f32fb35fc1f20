"""SECURITY.md promises what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import audit
from tav_opt.contract import MAX_PROMPTS
from tav_opt.serving.gateway import behind, http_face, json_tensors, rules, settings

WHOLE = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
TEXT = " ".join((Path(__file__).parents[1] / "SECURITY.md").read_text().split())


def test_its_figures_are_those_of_the_code():
    told = {
        r"a request may have (\d+) MiB": rules.MAX_REQUEST_BYTES >> 20,
        r"of which (\d+) MiB may be JSON": rules.MAX_SPELT_BYTES >> 20,
        r"in (\d+) fields": rules.MAX_FIELDS,
        r"in flight together (\d+) MiB": behind.IN_FLIGHT_BYTES >> 20,
        r"; (\d+) prompts;": MAX_PROMPTS,
        r"an id of (\d+) bytes": rules.MAX_ID_BYTES,
        r"JSON lists (\d+) deep": json_tensors.MAX_DEPTH,
        r"a body must come within (\d+) s": http_face.BODY_SECONDS,
        r"asks for nothing is closed within (\d+) s": settings.KEEPALIVE_SECONDS,
        r"died twice is refused for (\d+) minutes": behind.SUSPECT_SECONDS / 60,
    }
    assert behind.DEATHS == 2
    for words, expected in told.items():
        (found,) = re.findall(words, TEXT)
        assert float(found) == expected, words


@pytest.mark.parametrize(
    ("pins", "words", "status"),
    [
        ([{"name": "a", "skip_reason": "not found"}] * 3, "knows any of 3 pins: nothing was audited", 0),
        ([{"name": "a", "skip_reason": "not found"}, WHOLE], "1 of 2 pins are known to its service, with 0 known", 0),
        ([WHOLE, FLAWED], "b 2 has X-1, mended in 3", 1),
    ],
)
def test_an_audit_of_nothing_does_not_pass_for_one(pins, words, status):
    """pip-audit itself says `No known vulnerabilities found` of pins that nobody knows."""
    told, ended = audit.verdict(pins)
    assert words in told and ended == status
