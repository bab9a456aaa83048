"""`/`: the files of the playground, a page that uses the API like any other client."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from masquerade.errors import NotFound
from masquerade.http.downloads import Download

router = APIRouter(include_in_schema=False)

_INSTALLED = Path(__file__).parent.parent / "web"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[3] / "clients" / "web"
_FILES = {path.name: path for path in FOLDER.iterdir()}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # an old page must not run against an upgraded server
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/")
async def show_playground() -> Download:
    """The page."""
    return Download(FOLDER / "index.html", headers=HEADERS)


@router.get("/web/{name}")
async def show_file(name: str) -> Download:
    """A script, style or picture of the page."""
    path = _FILES.get(name)
    if path is None:
        raise NotFound(f"the playground has no file {name!r:.80}")
    return Download(path, headers=HEADERS)
