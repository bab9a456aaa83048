"""The policy of a server from its options, and whether it may listen where it is told to. Imports FastAPI."""

from __future__ import annotations

from masquerade.cli.server_options import ServerOptions
from masquerade.errors import InvalidValue
from masquerade.http.limits import Policy, is_loopback

WRONG_KEY_SECONDS = 0.25  # limits a client that guesses keys to four attempts a second per connection


def make_policy(options: ServerOptions, host: str, keys: int) -> Policy:
    """The limits and options of a server that listens on `host`. Raises `InvalidValue` if it would be open to others
    without being told to.
    """
    if not (keys or options.insecure_no_auth or is_loopback(host)):
        raise InvalidValue(
            f"{host} can be reached from other machines and the store has no keys; make one with `masquerade keys "
            "add`, use 127.0.0.1, or give --insecure-no-auth if a proxy in front of the server authenticates clients"
        )
    return Policy(
        loopback=is_loopback(host) and not options.insecure_no_auth,
        cors_origins=tuple(options.cors_origin or ()),
        answer_seconds=options.answer_seconds,
        wrong_key_seconds=WRONG_KEY_SECONDS,
        response_days=options.response_days,
        gateway_metrics=options.gateway_metrics,
    )
