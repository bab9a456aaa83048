"""What compose and Kubernetes are given is valid, pinned and locked down, and names options that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest

from masquerade.packaged import PACKAGED
from tests.cli.running import succeed
from tests.docker.manifests import DOCKER, ROOT, kubernetes, read_yaml

COMPOSE = [ROOT / "compose.yaml", DOCKER / "compose.keys.yaml"]
PROFILES: list[list[str]] = [[], ["gpu"], ["observability"], ["gpu", "observability"]]
KUBERNETES = "1.37.0"  # the newest that the validator knows


def variables() -> Iterator[tuple[str, str]]:
    """Every option that is set by the environment, with its value."""
    yield from re.findall(r"(MASQUERADE_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    for file in COMPOSE:
        for service in read_yaml(file)["services"].values():
            yield from service.get("environment", {}).items()
    for thing in kubernetes():
        for container in thing["spec"].get("template", {}).get("spec", {}).get("containers", ()):
            yield from ((one["name"], one["value"]) for one in container["env"])


def test_every_variable_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ = [(name, value) for name, value in variables() if name.startswith("MASQUERADE_")]
    assert len(set_) >= 8
    for name, value in set_:
        monkeypatch.setenv(name, value)
        found = succeed("config", "show", "serve")["settings"]
        assert name in {one["source"] for one in found}, name
        monkeypatch.delenv(name)


def test_a_list_of_key_files_can_be_given_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_SERVE_KEY_FILE", "admin=/run/a metrics=/run/b")
    found = {one["option"]: one["value"] for one in succeed("config", "show", "serve")["settings"]}
    assert found["--key-file"] == ["admin=/run/a", "metrics=/run/b"]


def test_compose_files_follow_the_specification() -> None:
    options = compose_spec.PyOptions()
    options.apply_merge = True
    whole, above = (
        options.from_yaml(re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", file.read_text(encoding="utf-8"))) for file in COMPOSE
    )
    whole.validate()
    assert above.service_names() == ["masquerade", "gpu"]


def find_compose() -> list[str] | None:
    """The command that there is: the plugin of docker's client, or the program of old."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True, check=False).returncode
        ):
            return command
    return None


@pytest.mark.parametrize("profiles", PROFILES)
def test_compose_accepts_every_profile(profiles: list[str]) -> None:
    command = find_compose()
    if command is None:
        pytest.skip("needs docker compose")
    chosen = [flag for profile in profiles for flag in ("--profile", profile)]
    files = COMPOSE if profiles == ["gpu"] else COMPOSE[:1]
    named = [flag for file in files for flag in ("--file", str(file))]
    done = subprocess.run([*command, *named, *chosen, "config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_services_are_pinned_and_may_do_nothing_more_than_they_must() -> None:
    services = read_yaml(COMPOSE[0])["services"]
    assert set(services) == {"masquerade", "gpu", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    assert "profiles" not in services["masquerade"]
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_secrets_are_files_that_git_ignores() -> None:
    secrets = {name: one for file in COMPOSE for name, one in read_yaml(file)["secrets"].items()}
    used = {name for file in COMPOSE for one in read_yaml(file)["services"].values() for name in one.get("secrets", ())}
    assert used == secrets.keys() == {"admin-key", "metrics-key", "grafana-password"}
    for one in secrets.values():
        assert one["file"].startswith("docker/secrets/")
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for name, value in variables():
        if re.search(r"PASSWORD|TOKEN|SECRET|KEY", name):
            assert all(part.rpartition("=")[2].startswith("/run/secrets/") for part in value.split()), name


def test_bases_are_pinned_and_the_user_is_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    bases = {line.split()[1] for line in lines if line.startswith("FROM ")}
    (base,) = bases
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_a_model_can_be_put_into_the_image() -> None:
    """Compose and the Dockerfile agree on the argument; a model in the image is found by its own package."""
    file = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert file.count("\nARG MODEL=demo\n") == 1
    assert "MASQUERADE_SERVE_MODEL=$MODEL" in file
    assert read_yaml(COMPOSE[0])["services"]["masquerade"]["build"]["args"]["MODEL"] == "${MODEL:-demo}"
    stages = file.split("\nFROM ")[1:]
    assert [stage.count("\nARG MODEL\n") for stage in stages] == [1, 1]  # an argument counts where it is declared
    (place,) = re.findall(r"XDG_CACHE_HOME=(\S+)", file)
    assert f"COPY --from=build {Path(place).parent} {Path(place).parent}" in file
    for model in PACKAGED.values():
        assert model.licence == "Apache-2.0", "name the licence in the image's label"
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in file


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (one for one in kubernetes() if one["kind"] == kind)
    return found


def test_kubernetes_takes_what_it_knows() -> None:
    known = [one for one in kubernetes() if one["kind"] != "PodMonitor"]  # which an operator brings along
    assert len(known) == 4
    for thing in known:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def test_the_pod_is_the_image_and_has_time_to_drain() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}
    assert pod["terminationGracePeriodSeconds"] >= float(told["MASQUERADE_SERVE_DRAIN_SECONDS"]) + 20
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    ports = {port["name"] for port in container["ports"]}
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert ports == {"http"} == {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]}


def test_monitoring_and_scaling_find_the_pods() -> None:
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    monitor, scaler = of_kind("PodMonitor")["spec"], of_kind("HorizontalPodAutoscaler")["spec"]
    assert monitor["selector"]["matchLabels"] == labels == of_kind("Service")["spec"]["selector"]
    assert {one["port"] for one in monitor["podMetricsEndpoints"]} == {"http"}
    assert scaler["scaleTargetRef"]["name"] == of_kind("Deployment")["metadata"]["name"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "masquerade_queue_requests"
