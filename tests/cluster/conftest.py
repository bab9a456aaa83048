"""Skips these tests where Ray is not installed, and imports it, which warns of what it uses, before they are read."""

from __future__ import annotations

import importlib.util
import warnings

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve  # noqa: F401
