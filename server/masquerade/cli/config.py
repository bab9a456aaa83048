"""The configuration file and `masquerade config`: the value of each option, and its source.

The TOML file has a section per command; options above the sections apply to every command that has them. Precedence:
command line, environment, file, default.
"""

# click merges these sources itself and reports which one a value came from; pydantic-settings would need a second
# definition of every option, as a model's field.

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand, TyperGroup, TyperOption

from masquerade.cli.options import AsJson, say
from masquerade.database.url import hide_credentials
from masquerade.errors import InvalidValue

FILE = "masquerade.toml"
FLAG = "--config"
Names = tuple[str, ...]  # path of a command, outermost group first
Tree = dict[str, Any]  # click's default map: commands and options, by their Python names
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        FLAG,
        envvar="MASQUERADE_CONFIG",
        help=f"TOML file of options, \\[serve] port = 9000; by default {FILE} here or in the user's config folder.",
    ),
]

app = typer.Typer(help="Show the values of options and their sources.", no_args_is_help=True)


@dataclass(frozen=True)
class Setting:
    """An option of a command, its value, and the source of the value."""

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


def read_section(context: typer.Context, config: Path | None) -> Path | None:
    """The callback of a command's own option for the file: its section there."""
    if config is not None:
        section = _load(config, _group(context))
        for name in _find_path(context):
            section = section[name]
        context.default_map = section
    return config


def _find_path(context: Any) -> Names:
    """The names of a context's command, outermost group first."""
    return (*_find_path(context.parent), context.info_name) if context.parent else ()


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a file. Raises `InvalidValue`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} is not TOML: {error}") from None


def find_file() -> Path | None:
    """The default file: in the working directory, else in the user's config folder."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "masquerade"
    return next((path for path in (Path(FILE), folder / FILE) if path.is_file()), None)


@app.command("show")
def show_config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="Only this command, such as `serve` or `masks ls`.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the value of each option without flags, and its source."""
    settings = [one for one in collect(context) if command in ("", one.command)]
    if not settings:
        raise InvalidValue(f"there is no command {command!r:.80} with options")
    file = context.find_root().obj
    shown = [vars(one) | {"value": _plain(one.value)} for one in settings]
    table = Table("command", "option", "value", "from")
    for one in shown:
        table.add_row(*map(str, one.values()))
    say(as_json, {"file": str(file) if file else None, "settings": shown}, table)


def collect(context: typer.Context) -> Iterator[Setting]:
    """The settings of every command without flags. Raises `InvalidValue` for a value of the wrong type."""
    root = context.find_root()
    for path, command in _commands(_group(root)):
        scope = root
        for part in path:
            scope = typer.Context(command, info_name=part, parent=scope)
        for option in _options(command).values():
            given, source = option.consume_value(scope, {})
            origin = _name_source(option, source.name, scope)
            try:
                value = given if given is None else option.process_value(scope, given)
            except typer.BadParameter as error:
                raise InvalidValue(f"{' '.join(path)} {option.opts[0]} of {origin}: {error.message}") from None
            yield Setting(" ".join(path), option.opts[0], value, origin)


def _name_source(option: TyperOption, source: str, context: Any) -> str:
    if source == "ENVIRONMENT":
        return (
            option.envvar if isinstance(option.envvar, str) else f"{context.auto_envvar_prefix}_{option.name}".upper()
        )
    if source == "DEFAULT_MAP":
        return str(context.find_root().obj)
    return "default"


def _load(path: Path, root: TyperGroup) -> Tree:
    """The file as click's default map. Raises `InvalidValue`, which names file, section and key, and suggests a key."""
    content = read_toml(path)
    common = {key: value for key, value in content.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    every = {key for _, command in _commands(root) for key in _settable(command)}
    for key in common:
        if _normalise(key) not in every:
            raise InvalidValue(f"{path}: there is no option {key!r}{_suggest(_normalise(key), every)}")
    return _fill(path, root, sections, {_normalise(key): value for key, value in common.items()}, ())


def _fill(path: Path, group: TyperGroup, sections: Mapping[str, Any], common: Mapping[str, Any], above: Names) -> Tree:
    """A group's part of the map: for each command the common values that it accepts, then its section."""
    for key in sections:
        if key not in group.commands:
            section = f"[{'.'.join((*above, key))}]"
            raise InvalidValue(f"{path}: there is no command for the section {section}{_suggest(key, group.commands)}")
    tree: Tree = {}
    for name, command in group.commands.items():
        own, where = sections.get(name, {}), (*above, name)
        if not isinstance(own, dict):
            raise InvalidValue(f"{path}: {'.'.join(where)} is a command; write a section [{'.'.join(where)}]")
        if isinstance(command, TyperGroup):
            tree[name] = _fill(path, command, own, common, where)
            continue
        options = _settable(command)
        given = {key: value for key, value in common.items() if key in options}
        for key, value in own.items():
            if _normalise(key) not in options:
                guess = _suggest(_normalise(key), options)
                raise InvalidValue(f"{path}: [{'.'.join(where)}] has no option {key!r}{guess}")
            given[_normalise(key)] = value
        tree[name] = {str(options[key].name): _check(path, where, key, given[key], command) for key in given}
    return tree


def _check(path: Path, where: Names, key: str, value: Any, command: Any) -> Any:
    """The value, as click expects it. Raises `InvalidValue`, which names the file, if the option does not accept it."""
    option = _options(command)[key]
    bad = f"{path}: [{'.'.join(where)}] {key} is {hide_credentials(repr(value)):.80}"
    if option.multiple != isinstance(value, list):
        raise InvalidValue(f"{bad}; it must be {'a list' if option.multiple else 'one value'}")
    if isinstance(value, dict) or option.is_flag != isinstance(value, bool):
        raise InvalidValue(f"{bad}; it must be {'true or false' if option.is_flag else 'a string or a number'}")
    converted = [str(one) for one in value] if option.multiple else value if option.is_flag else str(value)
    try:
        option.process_value(typer.Context(command), converted)
    except typer.BadParameter as error:
        raise InvalidValue(f"{bad}: {error.message}") from None
    return converted


def _commands(group: TyperGroup, above: Names = ()) -> Iterator[tuple[Names, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command, (*above, name))
        elif isinstance(command, TyperCommand):
            yield (*above, name), command


def _options(command: Any) -> dict[str, TyperOption]:
    """A command's options by their names without leading dashes, except `--help`."""
    found = (parameter for parameter in command.params if isinstance(parameter, TyperOption))
    return {_normalise(option.opts[0].lstrip("-")): option for option in found}


def _settable(command: Any) -> dict[str, TyperOption]:
    """The options that the file may have: all but the file's own."""
    return {key: option for key, option in _options(command).items() if option.opts[0] != FLAG}


def _group(context: Any) -> TyperGroup:
    command = context.find_root().command
    assert isinstance(command, TyperGroup)
    return command


def _normalise(key: str) -> str:
    return key.replace("_", "-")


def _suggest(key: str, known: Mapping[str, Any] | set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"; is {near[0]!r} meant?" if near else f"; there are {', '.join(sorted(known))}" if len(known) < 12 else ""


def _plain(value: Any) -> Any:
    """A value that JSON can represent."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
