"""The `masq` command; needs the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `masq`, or name the extra that is missing."""
    try:
        from masquerade_client.cli.app import run
    except ModuleNotFoundError as error:
        sys.exit(f"masq needs the extra `cli` ({error}): pip install 'masquerade-client[cli]'")
    run()
