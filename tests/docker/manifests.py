"""Reads the files below docker/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def read_yaml(path: Path) -> Any:
    """The only document of a file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def kubernetes() -> list[dict[str, Any]]:
    """Every object of docker/kubernetes."""
    files = sorted((DOCKER / "kubernetes").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def dashboard() -> dict[str, Any]:
    """What Grafana shows."""
    found: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "masquerade.json").read_text("utf-8"))
    return found


def targets() -> list[tuple[str, str, str]]:
    """Panel, expression and legend of each query of the dashboard, variables being everything and a rate 30 s."""
    found = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = re.sub(r"\$(instance|persona)", ".*", target["expr"]).replace("$__rate_interval", "30s")
            found.append((panel["title"], expression, target["legendFormat"]))
    return found


def alerts() -> dict[str, str]:
    """Expression of each alert, by its name."""
    rules = read_yaml(DOCKER / "prometheus" / "alerts.yml")
    return {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
