"""The files of serving/deploy: what they run is there, and they check health by a request. No image is built here."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import tyro
import yaml

from tav_opt.cli import COMMANDS
from tav_opt.serving.gateway.settings import DRAIN_SECONDS
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import UNLOAD_SECONDS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "serving" / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["tav-opt"]


def entrypoint() -> list[str]:
    found = re.search(r"^ENTRYPOINT (.*)$", CONTAINERFILE, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def test_the_server_takes_the_options_it_is_started_with():
    command = entrypoint()
    assert command[:4] == ["tini", "--", "tav-opt", "serve"]
    assert str(tyro.cli(ServeConfig, args=command[4:]).repository) == "/models"


def test_health_is_checked_by_a_request():
    checks = [COMPOSE["healthcheck"]["test"][1:]]
    checks.append(json.loads(re.findall(r"^HEALTHCHECK .* CMD (.*)$", CONTAINERFILE, re.MULTILINE)[0]))
    assert checks == [["tav-opt", "probe"]] * 2
    assert "probe" in COMMANDS


def test_whoever_stops_it_waits_for_the_edits_in_flight():
    least = DRAIN_SECONDS + UNLOAD_SECONDS
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) > least


def test_the_ports_of_compose_are_of_this_machine_alone():
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["ports"])


def test_a_gpu_is_added_to_the_same_service_with_an_extra_that_there_is():
    (added,) = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"].values()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert added["build"]["args"]["EXTRA"] in extras and "ARG EXTRA=" in CONTAINERFILE
    (device,) = added["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_what_the_image_copies_is_there_and_not_ignored():
    kept = {
        line[1:] for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for line in re.findall(r"^COPY (.*)$", CONTAINERFILE, re.MULTILINE):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source
            assert source in kept, f"{source} is not sent to the builder"
    wanted = re.findall(r"numpy==\S+", (ROOT / "Makefile").read_text())
    assert wanted and all(pin in CONTAINERFILE for pin in wanted), "another numpy than the Makefile's"
