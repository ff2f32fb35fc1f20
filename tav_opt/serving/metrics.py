"""The worker's metrics for Prometheus, among Triton's own on its metrics port.

How many wait, and for how long, are Triton's `nv_inference_pending_request_count` and `nv_inference_queue_duration_us`.
"""

from __future__ import annotations

from typing import Any, get_args

from tav_opt.config import EngineName
from tav_opt.serving.report import STAGES, Report

BUCKETS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Seconds."""
STATUSES = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "UNAVAILABLE", "INTERNAL")
LOOKUPS = ("clip", "memory", "disk", "computed", "noise")


class Metrics:
    """All families, so that every one is there from the start; `instance` tells the gauges of model instances apart."""

    def __init__(self, pb_utils: Any, instance: str) -> None:
        self._pb = pb_utils
        self._families: list[Any] = []
        family, kind = self._family, pb_utils.MetricFamily
        stage = family("tav_opt_stage_seconds", "Time of a stage of an edit", kind.HISTOGRAM)
        self._stages = {name: stage.Metric(labels={"stage": name}, buckets=BUCKETS) for name in STAGES}
        total = family("tav_opt_request_seconds", "Time of a request in the worker, without the queue", kind.HISTOGRAM)
        self._request = total.Metric(labels={}, buckets=BUCKETS)
        requests = family("tav_opt_requests_total", "Requests that ended, by status", kind.COUNTER)
        self._requests = {name: requests.Metric(labels={"status": name}) for name in STATUSES}
        edits = family("tav_opt_edits_total", "Edits that were answered, by what ran the clip", kind.COUNTER)
        self._edits = {name: edits.Metric(labels={"engine": name}) for name in get_args(EngineName)}
        steps = family("tav_opt_steps_total", "Steps done", kind.COUNTER)
        self._steps = {name: steps.Metric(labels={"stage": name}) for name in ("invert", "sample")}
        speed = family("tav_opt_steps_per_second", "Sampling steps a second of the last edit", kind.GAUGE)
        self._speed = speed.Metric(labels={"instance": instance})
        lookups = family("tav_opt_starts_total", "Edits by where their start came from", kind.COUNTER)
        self._lookups = {name: lookups.Metric(labels={"from": name}) for name in LOOKUPS}
        sent = family("tav_opt_sent_bytes_total", "Bytes of responses", kind.COUNTER)
        self._sent = sent.Metric(labels={})
        self._gauges = {
            name: family(f"tav_opt_{name}", text, kind.GAUGE).Metric(labels={"instance": instance})
            for name, text in (
                ("clips_resident", "Clips that are loaded"),
                ("clips_bytes", "Bytes of the loaded clips' own tensors"),
                ("inversions_memory_bytes", "Bytes of inversions kept in memory"),
                ("memory_free_bytes", "Bytes of the device that nothing uses and no edit was promised, as last seen"),
                ("inversions_disk_bytes", "Bytes of inversions kept on disk, of all instances, as last seen"),
            )
        }

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = self._pb.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)  # its metrics go with it
        return family

    def ended(self, status: str, seconds: float, report: Report) -> None:
        """Counts a request."""
        self._requests[status].increment(1)
        self._request.observe(seconds)
        if status == "OK" and report.engine:
            self._edits[report.engine].increment(1)
        self._sent.increment(report.sent_bytes)
        for name, spent in report.seconds.items():
            self._stages[name].observe(spent)
        for name, steps in report.steps.items():
            self._steps[name].increment(steps)
        if report.inversion:
            self._lookups[report.inversion].increment(1)
        if report.steps.get("sample") and report.seconds.get("sample"):
            self._speed.set(report.steps["sample"] / report.seconds["sample"])

    def set(self, **gauges: float) -> None:
        for name, value in gauges.items():
            self._gauges[name].set(value)
