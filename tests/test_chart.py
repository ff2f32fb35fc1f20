"""The Helm chart by Helm's own engine: linted, rendered, every manifest held against Kubernetes' schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from pydantic import BaseModel

from tav_opt.app.app_config import AppConfig
from tav_opt.cli import COMMANDS
from tav_opt.cli.serve import told
from tav_opt.serving.gateway.settings import DRAIN_SECONDS
from tav_opt.serving.host.server import UNLOAD_SECONDS

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

ROOT = Path(__file__).parents[1]
CHART = ROOT / "serving" / "deploy" / "chart"
KUBERNETES = ("1.25", "1.30", "1.37")
CLAIM = {"models": {"existingClaim": "clips"}}
EVERYTHING = {
    "models": {
        "claim": {"create": True, "storageClass": "fast", "accessModes": ["ReadWriteMany"]},
        "pull": {"url": "s3://bucket/clips", "secretName": "store", "env": [{"name": "AWS_REGION", "value": "x"}]},
    },
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "serve": {"trace": "otlp://collector:4318", "args": ["--instances", "2", "--", "--log-verbose=1"]},
    "tls": {"secretName": "pair", "clientCaSecretName": "authority"},
    "service": {"annotations": {"a/b": "c"}},
    "autoscaling": {"enabled": True, "maxReplicas": 8},
    "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "site"}}}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "grafanaDashboard": {"enabled": True},
    "imagePullSecrets": [{"name": "registry"}],
    "podAnnotations": {"d": "e"},
    "podLabels": {"f": "g"},
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "edits",
}
GIVEN = {
    "claim": CLAIM,
    "pulled": {"models": {"pull": {"url": "hf://owner/name/clips"}}},
    "bare": {**CLAIM, "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "everything": EVERYTHING,
    "page": {
        **CLAIM,
        "page": {"enabled": True, "usersSecretName": "people", "rootPath": "/edits", "visitors": [{"podSelector": {}}]},
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "site"}}}]},
    },
}


def rendered(values: dict[str, Any], *, page: bool = False) -> dict[str, dict[str, Any]]:
    """The manifests of a release `edits`, by kind: the server's, or those of its page."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="edits", namespace="video")
    texts = [text for name, text in files.items() if name.endswith(".yaml") and name.endswith("page.yaml") == page]
    return {one["kind"]: one for text in texts for one in yaml.safe_load_all(text) if one}


def pod(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", GIVEN)
def test_helm_has_nothing_to_say_of_it(name):
    report = helm.lint(CHART, GIVEN[name], strict=True, kube_version="v1.30.0")
    said = [one for one in report["messages"] if one["error"] != "icon is recommended"]
    assert not said and not report["errors"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", GIVEN)
def test_every_manifest_is_one_of_kubernetes(name, version):
    for manifest in [*rendered(GIVEN[name]).values(), *rendered(GIVEN[name], page=True).values()]:
        if not manifest["apiVersion"].startswith("monitoring.coreos.com"):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_finds_what_is_wrong():
    service = rendered(CLAIM)["Service"]
    service["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(service, "1.30", strict=True)


def unknown(model: Any, path: str = "") -> list[str]:
    """Names that a model's class does not know, at any depth."""
    if isinstance(model, list):
        return [name for number, one in enumerate(model) for name in unknown(one, f"{path}[{number}]")]
    if not isinstance(model, BaseModel):
        return []
    found = [f"{path}.{name}" for name in model.model_extra or {}]
    return found + [more for name in model.model_fields_set for more in unknown(getattr(model, name), f"{path}.{name}")]


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_what_is_for_the_prometheus_operator_is_what_it_knows(kind):
    v1 = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="its models are not installed")
    manifest = rendered(EVERYTHING)[kind]
    assert not unknown(getattr(v1, kind).model_validate(manifest))
    manifest["spec"]["endpionts"] = []
    model = type(getattr(v1, kind).model_validate(manifest).spec)
    assert "endpionts" not in model.model_fields


def test_all_that_can_be_asked_for_is_there():
    kinds = "Deployment Service HorizontalPodAutoscaler PodDisruptionBudget NetworkPolicy ServiceMonitor".split()
    kinds += ["PersistentVolumeClaim", "PrometheusRule", "ConfigMap"]
    assert set(rendered(EVERYTHING)) == set(kinds)
    assert set(rendered(GIVEN["bare"])) == {"Deployment", "Service"}


@pytest.mark.parametrize("name", GIVEN)
def test_the_server_takes_the_arguments_it_is_started_with(name):
    (container,) = pod(rendered(GIVEN[name]))["containers"]
    config = told(container["args"])
    assert config.log_format == "json"
    assert (config.tls_certificate is not None) == (name == "everything")
    if name == "everything":
        assert config.trace == "otlp://collector:4318" and config.worker.instances == 2
        assert config.tritonserver_args == ("--log-verbose=1",)


@pytest.mark.parametrize("name", GIVEN)
def test_a_pod_is_probed_by_a_request_and_may_end_its_edits(name):
    spec = pod(rendered(GIVEN[name]))
    (container,) = spec["containers"]
    checks = [container[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "liveness", "readiness")]
    assert checks == [["tav-opt", "probe"]] * 3 and "probe" in COMMANDS
    assert spec["terminationGracePeriodSeconds"] > DRAIN_SECONDS + UNLOAD_SECONDS


@pytest.mark.parametrize("name", GIVEN)
def test_parts_that_name_each_other_agree(name):
    manifests = rendered(GIVEN[name])
    spec, labels = pod(manifests), manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (container,) = spec["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == ports
    volumes = {volume["name"] for volume in spec["volumes"]}
    for one in [container, *spec.get("initContainers", [])]:
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
        assert (
            one["securityContext"]["readOnlyRootFilesystem"] and not one["securityContext"]["allowPrivilegeEscalation"]
        )
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    selectors = [manifests["Service"]["spec"]["selector"]]
    selectors += [manifests[kind]["spec"]["selector"]["matchLabels"] for kind in manifests if kind in SELECTING]
    selectors += [
        manifests[kind]["spec"]["podSelector"]["matchLabels"] for kind in manifests if kind == "NetworkPolicy"
    ]
    assert len(selectors) > 1 and all(selector.items() <= labels.items() for selector in selectors)
    if "HorizontalPodAutoscaler" in manifests:
        target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert target["name"] == manifests["Deployment"]["metadata"]["name"]
        assert "replicas" not in manifests["Deployment"]["spec"], "it would fight the autoscaler at each upgrade"


SELECTING = ("Deployment", "PodDisruptionBudget", "ServiceMonitor")


def test_the_page_is_a_pod_of_its_own_that_asks_the_server():
    server, page = rendered(GIVEN["page"]), rendered(GIVEN["page"], page=True)
    assert set(page) == {"Deployment", "Service", "NetworkPolicy"} and not rendered(CLAIM, page=True)
    (container,) = pod(page)["containers"]
    assert container["command"] == ["tini", "--", "tav-opt", "app"] and "app" in COMMANDS
    config = tyro.cli(AppConfig, args=container["args"])
    port, metrics = (one["port"] for one in server["Service"]["spec"]["ports"] if one["name"] in ("grpc", "metrics"))
    name = server["Service"]["metadata"]["name"]
    assert (config.url, config.metrics_url) == (f"{name}:{port}", f"http://{name}:{metrics}/metrics")
    assert (config.tuning, config.host, config.root_path) == (False, "0.0.0.0", "/edits")
    (mount,) = (one for one in container["volumeMounts"] if one["name"] == "users")
    assert config.auth == (f"@{mount['mountPath']}/users",)
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod(page)["volumes"]}
    assert container["ports"] == [{"name": "page", "containerPort": config.port}]
    assert page["Service"]["spec"]["ports"][0]["targetPort"] == "page"
    labels = page["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert page["Service"]["spec"]["selector"].items() <= labels.items()
    assert not server["Service"]["spec"]["selector"].items() <= labels.items(), "it is no server"
    allowed = [{"podSelector": {"matchLabels": page["Service"]["spec"]["selector"]}}]
    assert all(rule["from"][-1:] == allowed for rule in server["NetworkPolicy"]["spec"]["ingress"])


def test_a_pod_has_one_gpu_whole():
    (container,) = pod(rendered(EVERYTHING))["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    deployment = rendered(EVERYTHING)["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    (container,) = pod(rendered(CLAIM))["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi"}


@pytest.mark.parametrize("name", ["pulled", "everything"])
def test_clips_are_pulled_by_a_command_that_there_is(name, monkeypatch):
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("tav_opt.repository.pulling.pull", lambda *given: asked.append(given))
    (puller,) = pod(rendered(GIVEN[name]))["initContainers"]
    assert puller["command"][0] == "tav-opt"
    COMMANDS[puller["command"][1]](puller["command"][2:])
    assert asked[0][:2] == (GIVEN[name]["models"]["pull"]["url"], Path("/models"))
    (volume,) = (one for one in pod(rendered(GIVEN[name]))["volumes"] if one["name"] == "models")
    assert not volume.get("persistentVolumeClaim", {}).get("readOnly"), "nothing could be pulled into it"


def test_the_autoscaler_asks_for_what_the_adapter_is_told_to_offer():
    (rule,) = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = rendered(EVERYTHING)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "say where the clips are: existingClaim, claim.create or pull.url"),
        ({"models": {"existingClaim": "a", "claim": {"create": True}}}, "two places: give one"),
        ({**CLAIM, "replicsa": 2}, "replicsa"),
        ({**CLAIM, "replicas": -1}, "replicas"),
        ({"models": {"pull": {"url": "bucket"}}}, "url"),
        ({**CLAIM, "serve": {"trace": "http://x"}}, "trace"),
        ({**CLAIM, "serve": {"args": ["--direct"]}}, "args"),
        ({**CLAIM, "serve": {"args": ["--grpc-port=1"]}}, "args"),
        ({**CLAIM, "terminationGracePeriodSeconds": 30}, "terminationGracePeriodSeconds"),
        ({**CLAIM, "page": {"rootPath": "edits"}}, "rootPath"),
        ({**CLAIM, "page": {"enabled": True}, "tls": {"secretName": "pair"}}, "it asks the server without TLS"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, words):
    with pytest.raises(helm.HelmError, match=words):
        rendered(values)


def test_every_value_is_in_the_schema_and_every_entry_of_it_in_the_values():
    def names(schema: dict[str, Any], at: str = "") -> set[str]:
        below = schema.get("properties", {})
        return {at} | {name for key, one in below.items() for name in names(one, f"{at}.{key}")}

    def given(values: Any, schema: dict[str, Any], at: str = "") -> set[str]:
        below = schema.get("properties")
        if not below:
            return {at}
        return {at} | {name for key, one in values.items() for name in given(one, below[key], f"{at}.{key}")}

    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert given(values, schema) == names(schema) - {".global"}


def test_the_chart_is_of_this_version():
    from tav_opt import __version__

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
