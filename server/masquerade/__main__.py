"""`python -m masquerade` is the `masquerade` command."""

from masquerade.cli import main

main()
