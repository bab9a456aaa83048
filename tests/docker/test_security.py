"""SECURITY.md names a test for what it claims, and each of them is there."""

from __future__ import annotations

import ast
import re

from tests.docker.manifests import ROOT

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", TEXT)
    assert len(named) > 40
    for file, test in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for name in test.split("::")[1:]:
            found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
            assert found, f"{file}{test}"
            body = found[0].body


def test_every_row_of_what_is_hostile_names_one() -> None:
    for line in TEXT.partition("## What is hostile")[2].splitlines():
        if line.startswith("| ") and not line.startswith("| can |"):
            assert "`tests/" in line, line
