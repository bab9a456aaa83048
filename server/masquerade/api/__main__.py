"""`python -m masquerade.api`: the interface in Markdown, as in `docs/api.md`."""

from __future__ import annotations

from masquerade.api.app import describe
from masquerade.api.manual import write

if __name__ == "__main__":
    print(write(describe().openapi()), end="")
