"""`masquerade ray`: replicas of a server on a Ray cluster."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import CommandInfo

from masquerade.cli import heap
from masquerade.cli.build import DATA_FILES, POOL
from masquerade.cli.build import build as build_here
from masquerade.cli.config import FLAG, read_section, read_toml
from masquerade.cli.options import AsJson, require_ray
from masquerade.cli.server_options import ServerOptions, accept_server_options
from masquerade.errors import BuildFailed, InvalidValue
from masquerade.plan.processors import read_processors
from masquerade.sources import locate_model

if TYPE_CHECKING:
    from masquerade.cluster.builds import BuildTask

app = typer.Typer(help="Serve from a Ray cluster, and build on one.", no_args_is_help=True)
_log = logging.getLogger("masquerade")
_UsageError: Any = typer.BadParameter.__mro__[1]  # which typer does not export


@app.callback()
def describe() -> None:
    """Serve from a Ray cluster, and build on one."""


@app.command("deploy")
@accept_server_options
def deploy(
    options: ServerOptions,
    config: Annotated[  # noqa: ARG001 - its callback reads it
        Path | None,
        typer.Option(FLAG, is_eager=True, callback=read_section, help="TOML file; options are in \\[ray.deploy]."),
    ] = None,
    address: Annotated[str, typer.Option(help="The Ray cluster: `auto`, HOST:PORT, or ray://HOST:PORT.")] = "auto",
    name: Annotated[str, typer.Option(help="Name of the application in Ray Serve.")] = "masquerade",
    host: Annotated[str, typer.Option(help="Address that the proxy of each node listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that the proxies listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas, at most: their number follows the load; by default --replicas.")
    ] = None,
    target_requests: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Requests of a replica, waiting ones included, that autoscaling aims at; by default --max-running.",
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.1, help="Cores that a replica takes.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that a replica takes.")] = 0.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds for the running answers of a replica that is replaced or stopped.")
    ] = 600.0,
) -> None:
    """Deploy a server on a Ray cluster, or upgrade it: running answers complete on the replicas that they began on.

    The store has to be a bucket, or a folder that all nodes share.
    """
    require_ray()
    from masquerade.cli.serve import prepare_store  # as late as Ray

    root, keys = prepare_store(options)
    with heap.importing():
        from masquerade.cli import server
        from masquerade.cli.policy import make_policy
        from masquerade.cluster import deployment
        from masquerade.http import logs
    logs.configure(options.log_format)
    if options.split_layers > max(1, gpus):
        raise InvalidValue(f"--split-layers {options.split_layers} needs as many GPUs in a replica; --gpus is {gpus:g}")
    policy = make_policy(options, host, keys)
    scale = deployment.Scale(
        replicas,
        max_replicas,
        target_requests=target_requests or float(options.max_running),
        most_requests=server.count_requests(options),
        cpus=cpus,
        gpus=gpus,
        drain_seconds=drain_seconds,
    )
    server.announce_plan(options)
    make_app = partial(server.make_app, options, root, policy)
    deployment.deploy(make_app, policy, scale, address, name, host, port)
    _log.info("%s is deployed; `serve status` shows its replicas, `serve shutdown` ends them", name)


@app.command("build")
def build(
    file: Annotated[
        Path,
        typer.Argument(
            help="TOML file: options of `masquerade build` for all in \\[build], for each in a \\[\\[persona]]."
        ),
    ],
    address: Annotated[
        str, typer.Option(help="The Ray cluster: `auto`, HOST:PORT, or `local` for this machine.")
    ] = "auto",
    cpus: Annotated[float, typer.Option(min=0.1, help="Cores that a build takes.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that a build takes.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Build many personas, as many at once as the cluster has room for, into the store that the file names.

    Exit status 1 if one of them fails; the others are built all the same.
    """
    require_ray()
    tasks = read_builds(file)
    from masquerade.cluster import builds, connection

    ended: list[builds.BuildOutcome] = []
    with connection.connect(address):
        if address == connection.LOCAL:  # a cluster may get more nodes
            builds.check_room(cpus, gpus)
        for outcome in builds.run_builds(tasks, cpus, gpus):
            ended.append(outcome)
            end = "built" if outcome.status == 0 else f"failed with status {outcome.status}: {outcome.last_line}"
            print(f"{len(ended)} of {len(tasks)}: {outcome.name} {end}", file=sys.stderr, flush=True)
    failed = [one for one in ended if one.status]
    personas = [one for outcome in ended for one in outcome.personas]
    if as_json:
        print(json.dumps({"personas": personas, "failed": {one.name: one.last_line for one in failed}}))
    if failed:
        raise BuildFailed(f"{len(failed)} of {len(ended)} builds failed: {', '.join(one.name for one in failed)}")


def read_builds(file: Path) -> list[BuildTask]:
    """The builds of a file, with the content of the files that they name. Raises `InvalidValue`."""
    from masquerade.cluster.builds import BuildTask

    content = read_toml(file)
    shared, personas = content.pop("build", {}), content.pop("persona", None)
    tables = [shared, *personas] if isinstance(personas, list) and personas else [None]
    if content or not all(isinstance(table, dict) for table in tables):
        raise InvalidValue(f"{file} must have a table [[persona]] for each build, and may have one [build]")
    tasks = []
    for number, persona in enumerate(personas, 1):
        where = f"{file}: [[persona]] {number}"
        options = [*_list_options({**shared, **persona})]
        _check_options(where, options)
        files = _read_files(where, file.parent, options)
        options = [(name, locate_model(value, file.parent) if name == "--model" else value) for name, value in options]
        tasks.append(BuildTask(str(persona.get("name")), options, files))
    return tasks


def _read_files(where: str, folder: Path, options: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bytes]:
    """The content of the data files that the options name. Raises `InvalidValue` for one that cannot be read."""
    files = {}
    for name, value in options:
        if name not in DATA_FILES or (name, value) == ("--contrast", POOL):
            continue
        try:
            files[name, value] = (folder / value).read_bytes()
        except OSError as error:
            raise InvalidValue(f"{where}: {name} {value:.80} cannot be read: {error.strerror}") from None
    return files


def _list_options(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a table as options: a list repeats one, `true` is a flag."""
    for key, value in table.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not False:
                yield f"--{key.replace('_', '-')}", "" if one is True else str(one)


def _check_options(where: str, options: Sequence[tuple[str, str]]) -> None:
    """Raise `InvalidValue` for what `masquerade build` would not accept."""
    command = typer.main.get_command_from_info(
        CommandInfo("build", callback=build_here), pretty_exceptions_short=False, rich_markup_mode=None
    )
    arguments = [part for option in options for part in option if part]
    try:
        context = command.make_context("build", arguments)
    except _UsageError as error:
        raise InvalidValue(f"{where}: {error.format_message()}") from None
    if context.params["shards"] > 1:
        raise InvalidValue(f"{where}: a task is not divided into others; `masquerade build --shards` divides a build")


def share_processors(replicas: int) -> float:
    """Cores for each of several replicas on this machine."""
    return max(1.0, float(read_processors().threads // replicas))
