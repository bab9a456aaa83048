"""The `masq` command. Exit statuses: 0 success, 1 the work failed, 2 usage, 130 interrupted."""

from __future__ import annotations

import json
import os
import sys

import typer

from masquerade_client import BadRequest, ConnectionFailed, MasqueradeError, __version__
from masquerade_client.cli import build, chat, compare, personas, top
from masquerade_client.cli.options import AsJson, share

app = typer.Typer(
    name="masq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(share)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("personas")(personas.show)
app.command("build")(build.build)
app.command("top")(top.top)


@app.command("version")
def show_version(as_json: AsJson = False) -> None:
    """Print the version."""
    print(json.dumps({"version": __version__}) if as_json else __version__)


def run() -> None:
    """Run the command; an expected failure is one line on stderr."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it is None if the caller closed it
    if not all(map(_is_text, sys.argv)):
        _fail("an argument is not valid UTF-8; what goes to the server is text", 2)
    try:
        app()
    except BadRequest as error:
        _fail(error, 2)
    except ConnectionFailed as error:
        _fail(f"{error}: is the server running at this address (--url, MASQUERADE_URL)?", 1)
    except BrokenPipeError:  # the reader of a pipe closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MasqueradeError, OSError) as error:
        _fail(error, 1)


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # a byte that was no text
        return False
    return True


def _fail(error: object, status: int) -> None:
    print(f"masq: {error}", file=sys.stderr)
    sys.exit(status)
