"""The configuration file, and `masquerade config`: where each option's value comes from.

Knows one TOML file: a section for each command with its options, and above the sections what is for every command that
has the option. A flag counts before the environment, that before the file, and that before the default. Refuses to know
what an option means.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup, TyperOption

from masquerade.cli.options import AsJson
from masquerade.errors import InvalidValue

FILE = "masquerade.toml"
FLAG = "--config"
Names = tuple[str, ...]  # of a command, from the outermost group on
Tree = dict[str, Any]  # commands and options, by the names that Python calls them
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        FLAG,
        envvar="MASQUERADE_CONFIG",
        help=f"A TOML file with options, [serve] port = 9000; by default {FILE} here, or in the user's config folder.",
    ),
]

app = typer.Typer(help="Where options get their values from.", no_args_is_help=True)


@dataclass(frozen=True)
class Setting:
    """An option of a command, its value, and who said so."""

    command: str
    option: str
    value: Any
    source: str  # `default`, a variable's name, or a file


def read_config(context: typer.Context, config: ConfigFile = None) -> None:
    """One base model, many personas, one batch."""
    path = config or find_file()
    if path is None:
        return
    context.default_map = _load(path, _group(context))
    context.obj = path


def find_file() -> Path | None:
    """The file that counts where none is named: of the working directory, else of the user's config folder."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "masquerade"
    return next((path for path in (Path(FILE), folder / FILE) if path.is_file()), None)


@app.command("show")
def show_config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="Only this one: `serve`, `masks ls`.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what each option is when no flag is given, and where that comes from."""
    settings = [one for one in collect(context) if command in ("", one.command)]
    if not settings:
        raise InvalidValue(f"there is no command {command!r:.80} with options")
    if as_json:
        file = context.find_root().obj
        shown = [vars(one) | {"value": _plain(one.value)} for one in settings]
        print(json.dumps({"file": str(file) if file else None, "settings": shown}))
        return
    table = Table("command", "option", "value", "from")
    for one in settings:
        table.add_row(one.command, one.option, str(_plain(one.value)), one.source)
    Console().print(table)


def collect(context: typer.Context) -> Iterator[Setting]:
    """The settings of every command, as they are without flags. Raises `InvalidValue` for what cannot be read."""
    root = context.find_root()
    for path, command in _commands(_group(root)):
        settled = root
        for part in path:
            settled = typer.Context(command, info_name=part, parent=settled)
        for option in _options(command).values():
            given, source = option.consume_value(settled, {})
            value = given if given is None else option.process_value(settled, given)
            yield Setting(" ".join(path), option.opts[0], value, _tell(option, source.name, settled))


def _tell(option: TyperOption, source: str, context: Any) -> str:
    if source == "ENVIRONMENT":
        return (
            option.envvar if isinstance(option.envvar, str) else f"{context.auto_envvar_prefix}_{option.name}".upper()
        )
    if source == "DEFAULT_MAP":
        return str(context.find_root().obj)
    return "default"


def _load(path: Path, root: TyperGroup) -> Tree:
    """The file as click's default map. Raises `InvalidValue` with file, section and key, and what may be meant."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} is not TOML: {error}") from None
    common = {key: value for key, value in content.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    every = {key for _, command in _commands(root) for key in _options(command)}
    for key in common:
        if _spell(key) not in every:
            raise InvalidValue(f"{path}: there is no option {key!r}{_guess(_spell(key), every)}")
    return _fill(path, root, sections, {_spell(key): value for key, value in common.items()}, ())


def _fill(path: Path, group: TyperGroup, sections: Mapping[str, Any], common: Mapping[str, Any], above: Names) -> Tree:
    """A group's part of the map: for each command the common values it has options for, then its own section's."""
    for key in sections:
        if key not in group.commands:
            section = f"[{'.'.join((*above, key))}]"
            raise InvalidValue(f"{path}: there is no command for the section {section}{_guess(key, group.commands)}")
    tree: Tree = {}
    for name, command in group.commands.items():
        own, where = sections.get(name, {}), (*above, name)
        if not isinstance(own, dict):
            raise InvalidValue(f"{path}: {'.'.join(where)} is a command; write a section [{'.'.join(where)}]")
        if isinstance(command, TyperGroup):
            tree[name] = _fill(path, command, own, common, where)
            continue
        options = _options(command)
        given = {key: value for key, value in common.items() if key in options}
        for key, value in own.items():
            if _spell(key) not in options:
                guess = _guess(_spell(key), options)
                raise InvalidValue(f"{path}: [{'.'.join(where)}] has no option {key!r}{guess}")
            given[_spell(key)] = value
        tree[name] = {str(options[key].name): _check(path, where, key, given[key], command) for key in given}
    return tree


def _check(path: Path, where: Names, key: str, value: Any, command: Any) -> Any:
    """The value, if the option takes it; else it is refused here, where the file can be named."""
    option = _options(command)[key]
    bad = f"{path}: [{'.'.join(where)}] {key} is {value!r:.80}"
    if option.multiple != isinstance(value, list):
        raise InvalidValue(f"{bad}; it must be {'a list' if option.multiple else 'one value'}")
    if isinstance(value, dict) or option.is_flag != isinstance(value, bool):
        raise InvalidValue(f"{bad}; it must be {'true or false' if option.is_flag else 'a string or a number'}")
    spoken = [str(one) for one in value] if option.multiple else value if option.is_flag else str(value)
    try:
        option.process_value(typer.Context(command), spoken)
    except typer.BadParameter as error:
        raise InvalidValue(f"{bad}: {error.message}") from None
    return spoken


def _commands(group: TyperGroup, above: Names = ()) -> Iterator[tuple[Names, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command, (*above, name))
        elif isinstance(command, TyperCommand):
            yield (*above, name), command


def _options(command: Any) -> dict[str, TyperOption]:
    """A command's options by how they are spelled, without dashes; `--help` is none."""
    found = (parameter for parameter in command.params if isinstance(parameter, TyperOption))
    return {_spell(option.opts[0].lstrip("-")): option for option in found}


def _group(context: Any) -> TyperGroup:
    command = context.find_root().command
    assert isinstance(command, TyperGroup)
    return command


def _spell(key: str) -> str:
    return key.replace("_", "-")


def _guess(key: str, known: Mapping[str, Any] | set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"; is {near[0]!r} meant?" if near else f"; there are {', '.join(sorted(known))}" if len(known) < 12 else ""


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
