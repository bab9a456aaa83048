"""Rules for the names of personas and modules, for digests and references."""

import re

from maskstore.errors import InvalidName

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
RESERVED = frozenset({"base", "none", "null", "all"})
MODULE_LIMIT = 256


def check_name(name: object) -> str:
    """The name itself if a persona, alias or tag may be called so, else InvalidName."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(f"{name!r:.80} is not a name: [a-z0-9][a-z0-9._-]{{0,63}}")
    if name.endswith("."):
        raise InvalidName(f"{name!r} ends with a dot, which some file systems drop")
    if name in RESERVED or name.split(".")[0] in _DEVICES:
        raise InvalidName(f"{name!r} is reserved")
    return name


def check_module(name: object) -> str:
    """The module's name if it is dotted ASCII words of at most 256 characters, else InvalidName."""
    if not isinstance(name, str) or len(name) > MODULE_LIMIT or not _MODULE.fullmatch(name):
        raise InvalidName(f"{name!r:.80} is not a module name: dotted ASCII words, at most {MODULE_LIMIT} characters")
    return name


def check_digest(digest: object, what: str = "digest") -> str:
    """The digest if it is 64 lower-case hex digits, else InvalidName."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidName(f"{digest!r:.80} is not a {what}: 64 lower-case hex digits")
    return digest


def split_reference(reference: str) -> tuple[str, str]:
    """`name` or `name@prefix` into (name, prefix or ""); a prefix has 8 to 64 hex digits."""
    name, at, prefix = reference.partition("@")
    check_name(name)
    if at and not _PREFIX.fullmatch(prefix):
        raise InvalidName(f"{prefix!r:.80} is not a digest prefix: 8 to 64 lower-case hex digits")
    return name, prefix
