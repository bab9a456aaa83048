"""What Prometheus and Grafana are given works: every query of the dashboard and every alert finds data of a server."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from masquerade.errors import MasqueradeError
from tests.docker.manifests import DOCKER, alerts, dashboard, read_yaml, targets
from tests.keys.making import bearer, make_key
from tests.serving import free_port, serve

WAIT_SECONDS = 60.0
COMPARISON = re.compile(r" (?:==|>|<|>=|<=) ")
RULES = DOCKER / "prometheus"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="needs prometheus and promtool"
)


def promtool(*arguments: str | Path, folder: Path = RULES) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_rules_are_right_and_fire_when_they_should() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts.test.yml")


def test_every_alert_is_tested_and_says_what_is_wrong() -> None:
    tests = (RULES / "alerts.test.yml").read_text(encoding="utf-8")
    for rule in read_yaml(RULES / "alerts.yml")["groups"][0]["rules"]:
        assert rule["alert"] in tests
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_dashboard_is_whole() -> None:
    """Panels do not overlap, ids are unique, and all of them ask the data source that is provisioned."""
    board = dashboard()
    (source,) = read_yaml(DOCKER / "grafana" / "datasources" / "prometheus.yml")["datasources"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        for asked in (panel, *panel.get("targets", ())) if panel["type"] != "row" else ():
            assert asked["datasource"] == {"type": source["type"], "uid": source["uid"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    rows = {panel["title"] for panel in board["panels"] if panel["type"] == "row"}
    assert len(rows) == 8


@contextmanager
def prometheus(folder: Path, target: str, token: str) -> Iterator[str]:
    """Prometheus as compose.yaml runs it, with another target and a shorter interval; gives its address."""
    (folder / "metrics-key").write_text(token + "\n")
    shutil.copy(RULES / "alerts.yml", folder)
    config = read_yaml(RULES / "prometheus.yml")
    config["global"] = dict.fromkeys(config["global"], "1s")
    (scrape,) = config["scrape_configs"]
    scrape["authorization"]["credentials_file"] = "metrics-key"
    scrape["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", "prometheus.yml", folder=folder)
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", f"--web.listen-address={address}", "--storage.tsdb.path=data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *options], cwd=folder, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, expression: str) -> list[dict[str, Any]]:
    """What an expression finds now, without what is no number; nothing before Prometheus is up."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as refusal:
        if refusal.code == 503:  # it is starting
            return []
        raise AssertionError(f"{expression}: {refusal.read().decode()}") from None
    except OSError:
        return []
    return [one for one in found if math.isfinite(float(one["value"][1]))]


def talk(base_url: str, token: str) -> None:
    """A little of everything: the base, two personas, prompts that were seen before, an error."""
    for persona in (None, "introvert", "gloomy", "nobody"):
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}
        post(base_url, "/v1/chat/completions", token, body | ({"persona": persona} if persona else {}))


def post(base_url: str, path: str, token: str, body: dict[str, Any]) -> None:
    headers = bearer(token) | {"Content-Type": "application/json"}
    request = urllib.request.Request(base_url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
    except urllib.error.HTTPError as refusal:
        refusal.close()


def sides(expression: str) -> list[str]:
    """What an alert compares: without the comparison there is data whether or not it fires."""
    return [side for side in COMPARISON.split(expression) if not re.fullmatch(r"[0-9.]+", side)]


@needs_prometheus
def test_every_query_finds_data_of_a_running_server(tmp_path: Path) -> None:
    store = tmp_path / "store"
    metrics, _ = make_key(store, "metrics")
    chat, _ = make_key(store, "chat")
    asked = {expression: legend for _, expression, legend in targets()}
    asked |= {side: "" for expression in alerts().values() for side in sides(expression)}
    asked["masquerade_ready"] = asked["masquerade_tokens_total"] = ""  # of the dashboard's variables
    # Nobody can ask for an error of the server itself.
    unseen = {one for one in asked if one.startswith("sum by (instance)") and "internal_error" in one}
    with (
        serve("--model", "demo", "--store", str(store)) as server,
        prometheus(tmp_path, server.base_url.removeprefix("http://"), metrics) as address,
    ):
        deadline = time.monotonic() + WAIT_SECONDS
        missing = set(asked) - unseen
        while missing and time.monotonic() < deadline:
            talk(server.base_url, chat)
            found = {one: ask(address, one) for one in sorted(missing)}
            missing -= {one for one, data in found.items() if data and names_all(asked[one], data)}
        assert not missing, (tmp_path / "log").read_text()
        names = {one["metric"]["__name__"] for one in ask(address, '{job="masquerade"}')}
        for expression in unseen:
            assert set(re.findall(r"masquerade_\w+", expression)) <= names
        assert not ask(address, 'ALERTS{alertstate="firing"}')


def test_what_counts_as_the_servers_error_is_every_code_of_its_status() -> None:
    codes = {error.code for error in describe_subclasses(MasqueradeError) if error.status >= 500} | {"internal_error"}
    at_start = {"cannot_listen", "unusable_store", "database_unreachable", "unusable_model"}
    of_jobs = {"build_failed", "build_unsaved", "mask_refused"}
    for expression in (alerts()["MasqueradeErrors"], *(one for _, one, _ in targets() if "internal_error" in one)):
        (counted,) = re.findall(r'code=~"([^"]+)"', expression)
        assert set(counted.split("|")) == codes - at_start - of_jobs


def describe_subclasses(kind: type[MasqueradeError]) -> set[type[MasqueradeError]]:
    return {one for direct in kind.__subclasses__() for one in (direct, *describe_subclasses(direct))}


def names_all(legend: str, data: list[dict[str, Any]]) -> bool:
    """Whether every label of a legend is in the data, but for zeroes that stand in for nothing."""
    return all(not one["metric"] or set(re.findall(r"{{(\w+)}}", legend)) <= one["metric"].keys() for one in data)
