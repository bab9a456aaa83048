"""Runs the command in the test's own process, where torch is imported already."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from masquerade.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


def masquerade(*arguments: str | Path) -> Done:
    """Run `masquerade` with arguments."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["masquerade", *map(str, arguments)]),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        main()
    code = end.value.code
    return Done(code if isinstance(code, int) else 0, stdout.getvalue(), stderr.getvalue())


def succeed(*arguments: str | Path) -> dict[str, Any]:
    """Run with --json; stdout is one object and nothing else."""
    done = masquerade(*arguments, "--json")
    assert done.status == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fail(status: int, *arguments: str | Path) -> str:
    """One line on stderr, nothing on stdout, no stack trace."""
    done = masquerade(*arguments)
    assert (done.status, done.stdout) == (status, ""), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("masquerade: ")
    assert "Traceback" not in done.stderr
    return last
