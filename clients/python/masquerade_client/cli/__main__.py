"""`python -m masquerade_client.cli`."""

from masquerade_client.cli import main

main()
