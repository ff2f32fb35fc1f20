"""`python -m benchmarks.audit constraints.txt`: pip-audit on what is pinned, where its service can be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

UNREACHABLE = ("ConnectionError", "ServiceError", "Could not connect", "ConnectTimeout", "Max retries exceeded")
SECONDS = 120


def main(constraints: str) -> int:
    """1 for a known vulnerability; where nobody can be asked it says so, and lets the rest go on."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", constraints, "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--format", "json"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"pip-audit: its service did not answer within {SECONDS} s: nothing was audited")
        return 0
    if run.stdout:
        told, status = verdict(json.loads(run.stdout)["dependencies"])
    elif any(word in run.stderr for word in UNREACHABLE):
        told, status = "its service cannot be reached from here: nothing was audited", 0
    else:
        told, status = run.stderr, 1
    print(f"pip-audit: {told}")
    return status


def verdict(pins: list[dict[str, Any]]) -> tuple[str, int]:
    """pip-audit's own answer, in words, and an exit status: to itself, pins that nobody knows of are no finding."""
    audited = [pin for pin in pins if "skip_reason" not in pin]
    found = [
        f"{pin['name']} {pin['version']} has {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no release'}"
        for pin in audited
        for flaw in pin["vulns"]
    ]
    if not audited:
        return f"no service that can be reached from here knows any of {len(pins)} pins: nothing was audited", 0
    told = f"{len(audited)} of {len(pins)} pins are known to its service, with {len(found)} known vulnerabilities"
    return "\n".join([told, *found]), int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
