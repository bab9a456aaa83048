"""`masquerade doctor`: the machine, the installation and a store, in a form for bug reports.

It changes nothing, and prints neither secrets nor the path of the home folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskstore import Checkup, MaskError, fsck
from maskstore.sqlite import open_readonly, read_version
from masquerade import __version__
from masquerade.cli import config
from masquerade.cli.options import AsJson, Database, Model, StoreFolder
from masquerade.cli.stores import LEAST_BYTES, SCHEMAS, find_store
from masquerade.database.url import DatabaseURL
from masquerade.errors import InvalidValue, MasqueradeError
from masquerade.plan.memory import format_bytes, read_host_memory
from masquerade.plan.processors import VARIABLE, read_processors

if TYPE_CHECKING:
    from masquerade.database.postgresql import PostgreSQL

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "fastapi", "uvicorn", "huggingface-hub")
EXTRAS = ["bitsandbytes", "cryptography", "llguidance", "psycopg", "s3fs", "ray", "triton", "opentelemetry-sdk"]
EXTRAS += ["accelerate", "peft"]
FLAGS = ["sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_bf16"]
FLAGS += ["asimd", "sve", "bf16"]
Facts = dict[str, Any]


def examine(
    context: typer.Context,
    model: Model = "demo",
    store: StoreFolder = None,
    database: Database = None,
    verify: Annotated[bool, typer.Option(help="Verify every mask of the store in full.")] = True,
    as_json: AsJson = False,
) -> None:
    """Describe the machine, the installation and a store for a bug report; exit status 1 if something is wrong."""
    problems: list[str] = []
    report = {
        "masquerade": {"version": __version__, "python": sys.version.split()[0], "system": _describe_system()},
        "packages": {name: version for name in (*PACKAGES, *EXTRAS) if (version := _find_version(name))},
        "hardware": _describe_hardware(),
        "kernels": _describe_kernels(),
        "configuration": _describe_configuration(context, problems),
        "store": _describe_store(store, model, verify, problems),
        "database": _describe_database(database, problems),
        "space": _describe_space(store, model, problems),
    }
    report = _hide_home(report)
    problems = _hide_home(problems)
    if as_json:
        print(json.dumps(report | {"wrong": problems}))
    else:
        for title, facts in report.items():
            print(f"{title}\n" + "".join(f"  {key}: {value}\n" for key, value in facts.items()), end="")
        print("\n".join(f"wrong: {problem}" for problem in problems) or "nothing is wrong")
    if problems:
        raise typer.Exit(1)


def _describe_system() -> str:
    release = Path("/etc/os-release")
    names = re.search(r'^PRETTY_NAME="?([^"\n]+)', release.read_text() if release.exists() else "", re.MULTILINE)
    return ", ".join(filter(None, (platform.platform(), names and names[1])))


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_hardware() -> Facts:
    import torch

    file = Path("/proc/cpuinfo")
    cpuinfo = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    facts: Facts = {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": _describe_cores(),
        "threads": f"{torch.get_num_threads()} compute ({VARIABLE}={os.environ.get(VARIABLE, 'not set')})",
        "instructions": " ".join(flag for flag in FLAGS if flag in present) or "not known",
        "memory": _describe_memory(),
    }
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return facts | {"gpus": "none" if built is None else f"none, although torch was built for CUDA {built}"}
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        facts[f"gpu {number}"] = (
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{format_bytes(free)} of {format_bytes(total)} free, CUDA {torch.version.cuda}"
        )
    return facts


def _describe_cores() -> str:
    found = read_processors()
    text = f"{os.cpu_count()} processors, of which this process may use {found.logical}, of {found.cores} cores"
    return text if found.quota is None else f"{text}; the container may use the time of {found.quota:g}"


def _describe_memory() -> str:
    found = read_host_memory()
    if found is None:
        return "not known"
    text = f"{format_bytes(found.available)} of {format_bytes(found.total)} available"
    return text if found.limit is None else f"{text}; the container may use {format_bytes(found.limit)}"


def _describe_kernels() -> Facts:
    """The backend for a plain Linear, per mask encoding, dtype and available device."""
    import torch
    from torch import nn

    from masquerade import kernels
    from masquerade.kernels.native import LIBRARY, find_library

    library = find_library() if LIBRARY.exists() else None
    facts: Facts = {"native": f"{library.isas[-1]} of {' '.join(library.isas)}" if library else "not built"}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            linear = nn.Linear(64, 64, device=device, dtype=dtype)
            chosen = {kind: kernels.choose(linear, kind, 1) for kind in ("sparse", "bitmap")}
            facts[f"{device} {str(dtype).removeprefix('torch.')}"] = ", ".join(
                f"{kind} masks by {backend}" for kind, backend in chosen.items()
            )
    return facts


def _describe_configuration(context: typer.Context, problems: list[str]) -> Facts:
    file = context.find_root().obj
    facts: Facts = {"file": str(file) if file else "none"}
    try:
        for one in config.collect(context):
            if one.source != "default":
                facts[f"{one.command} {one.option}"] = f"{one.value} (from {one.source})"
    except InvalidValue as error:
        problems.append(str(error))
    return facts


def _describe_store(store: Path | None, model: str, verify: bool, problems: list[str]) -> Facts:
    try:
        root = find_store(store, model)
    except (MasqueradeError, MaskError, OSError) as error:
        problems.append(str(error))
        return {"folder": "unknown, because the model was not found"}
    facts: Facts = {"folder": str(root)}
    if not root.is_dir():
        return facts | {"state": "none yet; the first command that needs it creates it"}
    try:
        versions = {name: read_version(root / name) for name in SCHEMAS if (root / name).exists()}
        facts["schemas"] = ", ".join(f"{name} {version}" for name, version in versions.items()) or "none"
        facts |= _check_masks(root, problems) if verify else {"masks": "not verified"}
        if "keys.sqlite" in versions:
            facts["keys"] = _count_keys(root)
        if "jobs/jobs.sqlite" in versions:
            with closing(open_readonly(root / "jobs" / "jobs.sqlite")) as db:
                facts["jobs"] = _count(dict(db.execute("select state, count(*) from job group by state").fetchall()))
    except (MasqueradeError, MaskError, OSError, sqlite3.Error) as error:
        problems.append(f"the store: {error}")
    return facts


def _describe_database(url: DatabaseURL | None, problems: list[str]) -> Facts:
    if url is None:
        return {"kind": "SQLite files in the store"}
    from masquerade.database.postgresql import PostgreSQL
    from masquerade.jobs import JobTable

    facts: Facts = {"kind": f"PostgreSQL at {url}"}
    try:
        database = PostgreSQL(url, create=False)
        facts["keys"] = _count_keys(Path(), database)
        jobs = JobTable(database.group("jobs")).count_jobs()
        facts["jobs"] = _count({state: count for state, count in jobs.items() if count})
        database.close()
    except MasqueradeError as error:
        problems.append(str(error))
    return facts


def _check_masks(root: Path, problems: list[str]) -> Facts:
    found: Checkup = fsck(root)
    problems += [f"the store: {one.kind}: {one.subject} {one.message}" for one in found.findings]
    nbytes = sum(path.stat().st_size for path in (root / "masks").glob("*/*.safetensors"))
    health = "clean" if found.clean else f"{len(found.findings)} findings; see `masquerade masks fsck`"
    return {"masks": f"{found.masks}, {format_bytes(nbytes)}, {health}", "leftovers": len(found.leftovers)}


def _describe_space(store: Path | None, model: str, problems: list[str]) -> Facts:
    facts: Facts = {}
    try:
        places = {"store": find_store(store, model)}
    except (MasqueradeError, MaskError, OSError):
        places = {}
    for name, place in (places | {"temporary files": Path(tempfile.gettempdir())}).items():
        there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        facts[name] = f"{format_bytes(free)} free, {'writable' if writable else 'not writable'}"
        if name == "store" and not writable:
            problems.append(f"the store: {there} cannot be written by user {os.getuid()}")
        if name == "store" and free < LEAST_BYTES:
            problems.append(
                f"the store: {format_bytes(free)} are free, and less than {format_bytes(LEAST_BYTES)} is too little"
            )
    return facts


def _count_keys(root: Path, database: PostgreSQL | None = None) -> str:
    from masquerade.keys.table import KeyTable

    return _count(Counter(key.problem(time.time()) or "valid" for key in KeyTable(root, database).all()))


def _count(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"


def _hide_home(thing: Any) -> Any:
    """A copy with the path of the home folder replaced by `~`."""
    if isinstance(thing, dict):
        return {key: _hide_home(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_hide_home(value) for value in thing]
    home = str(Path.home())
    return thing.replace(home, "~") if isinstance(thing, str) and home != "/" else thing
