"""The `masquerade` command.

Exit statuses: 0 success, 1 failure, 2 usage. Commands import torch only when they run, so that help and the commands
for mask files start fast.
"""

from __future__ import annotations

import sys

import typer

from maskstore import InvalidMaskValue, InvalidName, MaskError
from masquerade import __version__
from masquerade.cli import build, config, doctor, evaluate, keys, masks, plan, ray, serve
from masquerade.errors import BadRequest, MasqueradeError
from masquerade.plan.processors import limit_threads

app = typer.Typer(
    name="masquerade",
    help="One base model, many personas, one batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "MASQUERADE", "help_option_names": ["-h", "--help"]},
)
app.callback()(config.read_config)
app.command("serve")(serve.serve)
app.command("build")(build.build)
app.command("eval")(evaluate.evaluate)
app.command("plan")(plan.plan)
app.add_typer(masks.app, name="masks")
app.add_typer(keys.app, name="keys")
app.add_typer(ray.app, name="ray")
app.add_typer(config.app, name="config")
app.command("doctor")(doctor.examine)


@app.command("version")
def show_version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command; an expected failure is one line on stderr."""
    limit_threads()
    try:
        app()
    except (BadRequest, InvalidName, InvalidMaskValue) as error:
        _fail(error, 2)
    except (MasqueradeError, MaskError, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, status: int) -> None:
    print(f"masquerade: {error}", file=sys.stderr)
    sys.exit(status)
