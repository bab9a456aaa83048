"""One name for one thing, and a map (docs/structure.md) whose names exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("server/masquerade", "maskstore/maskstore", "clients/python/masquerade_client")
# Names that stand for two classes, with the reason.
SHARED = {
    # The client is a distribution of its own, and its public names are those of the server's concepts.
    *("BadRequest", "BuildFailed", "MasqueradeError", "NotFound", "Overloaded", "TimedOut", "Usage"),
    *("Certificate", "Diff", "Overlap", "Persona"),
}


def _names(path: Path) -> Iterator[str]:
    """Every class, function, method, field and constant of a module, as `name` or `Class.name`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{inner.name}"
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield f"{node.name}.{inner.target.id}"


def test_no_class_name_stands_for_two_things() -> None:
    defined = defaultdict(set)
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined[node.name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(places) for name, places in defined.items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if name not in SHARED} == {}
    assert set(twice) >= SHARED, "an exception that is not needed any more"


def test_what_the_map_names_exists() -> None:
    """Every `file.py` is a file, and every `file.py::name` is defined in it."""
    named = re.findall(r"`([\w/]+\.(?:py|md|cpp|h))(?:::([\w.]+))?`", (ROOT / "docs" / "structure.md").read_text())
    assert len(named) > 30
    for file, name in named:
        found = [base for base in (ROOT, *(ROOT / package for package in PACKAGES)) if (base / file).is_file()]
        assert found, f"docs/structure.md names {file}, which is not there"
        if name:
            assert name in set(_names(found[0] / file)), f"{file} has no {name}"
