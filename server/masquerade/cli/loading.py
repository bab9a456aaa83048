"""The HTTP server that answers while the model is loaded."""

from __future__ import annotations

import json
import socket
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from masquerade.errors import NotReady
from masquerade.http import errors

_BODY_LIMIT = 2**20
_UNAVAILABLE = NotReady("the model is being loaded; try again")


class Loading:
    """Within the block, `/healthz` gets 200 and every other request 503 with `Retry-After`, in the form of its API.

    The socket stays open: connections not yet accepted when the block ends are left to the next server.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._server = ThreadingHTTPServer(("", 0), _Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), name="loading", daemon=True)

    def __enter__(self) -> None:
        self._server.socket.setblocking(False)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5.0

    def answer(self) -> None:
        path, request_id = self.path.partition("?")[0], uuid.uuid4().hex
        live, anthropic = path == "/healthz", errors.is_anthropic(path)
        content: Any = {"status": "ok"}
        if not live:
            content = errors.anthropic_body(_UNAVAILABLE, request_id) if anthropic else errors.body(_UNAVAILABLE)
        body = json.dumps(content).encode()
        length = self.headers.get("Content-Length", "0")
        if length.isdecimal():
            self.rfile.read(
                min(int(length), _BODY_LIMIT)
            )  # a client reads the response only after it has sent its body
        self.send_response(200 if live else NotReady.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.send_header("x-request-id", request_id)
        if anthropic:
            self.send_header("request-id", request_id)
        if not live:
            self.send_header("Retry-After", str(NotReady.retry_after))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815 - http.server's names

    def version_string(self) -> str:
        """Omit the versions of Python and http.server."""
        return "masquerade"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log probes."""
