"""What docker/gateway gives to Kubernetes and to llm-d's picker: valid, consistent, and options that there are."""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest
import typer.main
import yaml

from masquerade.cli import app
from tests.docker.manifests import DOCKER, ROOT, kubernetes, read_yaml
from tests.docker.test_files import KUBERNETES

GATEWAY = DOCKER / "gateway"
LABEL = {"type": "string", "maxLength": 63, "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
PORT = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 65535}},
    "required": ["number"],
    "additionalProperties": False,
}
POOL = {  # spec of inference.networking.k8s.io/v1 InferencePool, after its reference
    "type": "object",
    "properties": {
        "selector": {
            "type": "object",
            "properties": {"matchLabels": {"type": "object", "minProperties": 1, "additionalProperties": LABEL}},
            "required": ["matchLabels"],
            "additionalProperties": False,
        },
        "targetPorts": {"type": "array", "minItems": 1, "maxItems": 8, "items": PORT},
        "appProtocol": {"enum": ["http", "kubernetes.io/h2c"]},
        "endpointPickerRef": {
            "type": "object",
            "properties": {
                "group": {"type": "string"},
                "kind": {"type": "string"},
                "name": {"type": "string", "minLength": 1, "maxLength": 253},
                "port": PORT,
                "failureMode": {"enum": ["FailOpen", "FailClose"]},
            },
            "required": ["name", "port"],  # the port, because the kind is a Service
            "additionalProperties": False,
        },
    },
    "required": ["selector", "targetPorts"],
    "additionalProperties": False,
}
NAME = {"type": "string", "minLength": 1}
PICKER = {  # EndpointPickerConfig, after llm-d's reference
    "type": "object",
    "properties": {
        "apiVersion": {"const": "llm-d.ai/v1alpha1"},
        "kind": {"const": "EndpointPickerConfig"},
        "plugins": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"name": NAME, "type": NAME, "parameters": {"type": "object"}},
                "required": ["type"],
                "additionalProperties": False,
            },
        },
        "schedulingProfiles": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "name": NAME,
                    "plugins": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"pluginRef": NAME, "weight": {"type": "number", "exclusiveMinimum": 0}},
                            "required": ["pluginRef"],
                            "additionalProperties": False,
                        },
                    },
                },
                "required": ["name", "plugins"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["apiVersion", "kind", "plugins", "schedulingProfiles"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """The objects of the manifest, by kind."""
    text = (GATEWAY / "masquerade.yaml").read_text(encoding="utf-8")
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects["Deployment"]["spec"]["template"]
    return found


def test_kubernetes_takes_the_manifest(objects: dict[str, dict[str, Any]]) -> None:
    assert set(objects) == {"PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy"}
    for thing in objects.values():
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def test_it_can_stand_beside_the_single_server(objects: dict[str, dict[str, Any]]) -> None:
    taken = {(one["kind"], one["metadata"]["name"]) for one in kubernetes()}
    assert not taken & {(kind, one["metadata"]["name"]) for kind, one in objects.items()}


def test_arguments_are_options_of_serve(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    command, *given = container["args"]
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    serve = commands[command]
    context = serve.make_context("serve", list(given))  # fails for an option that there is not
    assert (command, context.params["gateway_metrics"], context.params["insecure_no_auth"]) == ("serve", True, True)
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + context.params["drain_seconds"] + 20
    assert context.params["port"] == container["ports"][0]["containerPort"]


def test_ports_agree(objects: dict[str, dict[str, Any]], pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    pool = read_yaml(GATEWAY / "pool.yaml")["spec"]
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    (service,) = objects["Service"]["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (port["containerPort"], port["name"])
    (rule,) = objects["NetworkPolicy"]["spec"]["ingress"]
    assert [one["port"] for one in rule["ports"]] == [port["containerPort"]]
    exposed = re.findall(r"^EXPOSE (\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert exposed == [str(port["containerPort"])]
    paths = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe: one["path"] for probe, one in paths.items()} == {
        "startupProbe": "/health",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    assert {one["port"] for one in paths.values()} == {port["name"]}


def test_selectors_find_the_pods(objects: dict[str, dict[str, Any]], pod: dict[str, Any]) -> None:
    labels = pod["metadata"]["labels"].items()
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        read_yaml(GATEWAY / "pool.yaml")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in selectors)
    (admitted,) = (
        one["podSelector"]["matchLabels"]
        for one in objects["NetworkPolicy"]["spec"]["ingress"][0]["from"]
        if "podSelector" in one
    )
    picker = read_yaml(GATEWAY / "pool.yaml")["spec"]["endpointPickerRef"]["name"]
    assert admitted == {"app.kubernetes.io/name": picker}


def test_the_pod_is_locked_down(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_the_pool_follows_its_reference() -> None:
    pool = read_yaml(GATEWAY / "pool.yaml")
    assert (pool["apiVersion"], pool["kind"]) == ("inference.networking.k8s.io/v1", "InferencePool")
    jsonschema_rs.validate(POOL, pool["spec"])


def test_the_picker_follows_its_reference() -> None:
    config = read_yaml(GATEWAY / "picker.yaml")
    jsonschema_rs.validate(PICKER, config)
    declared = {one.get("name", one["type"]) for one in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    used = {one["pluginRef"]: one.get("weight") for one in profile["plugins"]}
    assert used.keys() <= declared
    scorers = {
        "queue-scorer",
        "kv-cache-utilization-scorer",
        "lora-affinity-scorer",
        "prefix-cache-scorer",
    }
    assert scorers == {name for name, weight in used.items() if weight}
    assert 0.2 * used["lora-affinity-scorer"] > used["prefix-cache-scorer"]
