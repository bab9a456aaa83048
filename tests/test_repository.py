"""The repository itself: no build products, nothing large, and no paths of somebody's machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 2**20
LARGE = {"server/masquerade/demo/model/model.safetensors": "the demo model, which a wheel serves without a download"}
PRODUCTS = re.compile(
    r"\.(a|class|dll|dylib|egg|exe|lib|o|obj|pyc|pyd|pyo|so(\.\d+)*|whl)$|(^|/)(__pycache__|[^/]+\.egg-info)/"
)
MAGIC = {
    "ELF": rb"\x7fELF",
    "an archive of objects": rb"!<(arch|thin)>\n",
    "Mach-O": rb"\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe",
    "PE": rb"(?s)MZ.{58}(?P<at>....)",
    "LLVM bitcode": rb"BC\xc0\xde",
    "a module that Python compiled": rb"(?s)..\r\n[\x00-\x03]\x00\x00\x00",
}
_START = (
    rb"(?:(?<![\w.~$}/-])|(?<=-[IL]))"  # where an absolute path begins: in words, after a NUL, in a compiler's option
)
HOMES = re.compile(
    _START + rb"/(?:home|Users)/[\w.-]+|" + _START + rb"/(?:root|work)(?=[/\s\"'`\x00]|$)[\w./-]*|[A-Z]:\\Users\\\w+"
)
BUILDS = re.compile(
    _START + rb"/(?:tmp|private|var/folders|builds?)/[\w.-]+"
)  # a text may name /tmp, a binary has been there


def product(name: str, content: bytes) -> str | None:
    """What was built, if the file was."""
    if PRODUCTS.search(name):
        return "a build product, by its name"
    for kind, magic in MAGIC.items():
        if (found := re.match(magic, content)) and (kind != "PE" or _is_pe(content, found)):
            return kind
    return None


def _is_pe(content: bytes, found: re.Match[bytes]) -> bool:
    at = int.from_bytes(found["at"], "little")
    return content[at : at + 4] == b"PE\0\0"


def paths(content: bytes) -> Iterator[bytes]:
    """Absolute paths of a machine that a file has no business to name."""
    for pattern in (HOMES, BUILDS) if b"\0" in content else (HOMES,):
        yield from (found[0] for found in pattern.finditer(content))


@pytest.fixture(scope="module")
def tracked() -> dict[str, bytes]:
    """Every file that git has, as it lies here."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not say: {error}")
    names = [name for name in listed.split("\0") if name]
    return {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}


def test_nothing_that_was_built_is_tracked(tracked: dict[str, bytes]) -> None:
    assert tracked
    built = {name: kind for name, content in tracked.items() if (kind := product(name, content))}
    assert not built


def test_large_files_are_few_and_have_a_reason(tracked: dict[str, bytes]) -> None:
    large = {name for name, content in tracked.items() if len(content) > LARGEST}
    assert large == set(LARGE)


def test_no_file_names_a_place_on_somebodys_machine(tracked: dict[str, bytes]) -> None:
    told = {name: found[:3] for name, content in tracked.items() if (found := [*paths(content)])}
    assert not told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.o", b""),
        ("lib/x.so.1", b""),
        ("a/__pycache__/b.txt", b""),
        ("tool", b"\x7fELF\x02\x01\x01"),
        ("tool", b"!<arch>\n"),
        ("tool", b"\xcf\xfa\xed\xfe\x07"),
        ("tool", b"MZ" + bytes(58) + b"\x40\0\0\0" + b"PE\0\0"),
        ("data", b"\xcb\x0d\r\n" + bytes(12)),
    ],
)
def test_what_was_built_is_known_by_name_or_content(name: str, content: bytes) -> None:
    assert product(name, content)


@pytest.mark.parametrize(("name", "content"), [("notes.md", b"MZ is a magic"), ("a.soap", b""), ("b.py", b"")])
def test_what_was_not_built_is_let_be(name: str, content: bytes) -> None:
    assert product(name, content) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"see {}home{}ann/x.py", True),
        (b"-I{}Users{}ann", True),
        (b'"{}root{}.cache"', True),
        (b"cd {}work{}tree", True),
        (b"\x00{}tmp{}ccXy1.o\x00", True),
        (b"cp x {}tmp{}masks", False),
        (b"https://a.example{}home{}page", False),
        (b"docs{}work{}flow", False),
        (b"{}workers{}3", False),
    ],
)
def test_which_paths_are_somebodys(content: bytes, told: bool) -> None:
    assert bool([*paths(content.replace(b"{}", b"/"))]) is told
