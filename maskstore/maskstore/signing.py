"""Ed25519 signatures of masks, the keys a store trusts, and which of two copies is better signed.

Version 2 covers tensors and metadata; version 1, which is still read, covers tensors only. The package `cryptography`
is imported on first use.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from maskstore import files, strictjson
from maskstore.errors import InvalidName, MaskNotFound, SignatureError
from maskstore.mask import BaseRef, Mask, MaskInfo
from maskstore.names import check_digest, check_name

Cover = Literal["everything", "tensors"]
_PREFIX = "2:"
TIMEOUT = 30.0  # seconds, for the lock of the trusted keys
_LINE = re.compile(r"([0-9a-f]{64}) (\S+)")


class Signable(Protocol):
    """All that a signature covers: of a mask, a header, an open file, a summary."""

    @property
    def base(self) -> BaseRef:
        """The model it is for."""

    @property
    def info(self) -> MaskInfo:
        """Its metadata."""

    @property
    def digest(self) -> str:
        """Its identity."""

    @property
    def signature(self) -> str | None:
        """As its file records it."""


@dataclass(frozen=True)
class Signature:
    """A mask's signature and the result of checking it."""

    key: str  # public
    covers: Cover
    valid: bool | None  # whether it verifies; None where `cryptography` is missing
    label: str | None  # of the key, if it is trusted


class Standing(IntEnum):
    """How much a copy's signature is worth; of two copies of one digest, the higher one is kept."""

    FALSE = 0  # it does not verify
    UNKNOWN = 1  # none, or by a key that is not trusted
    TENSORS = 2  # by a trusted key, over the tensors only
    EVERYTHING = 3  # by a trusted key, over tensors and metadata


def generate() -> tuple[str, str]:
    """A new (private, public) key, 64 hex digits each."""
    key = _cryptography()[0].Ed25519PrivateKey.generate()
    return key.private_bytes_raw().hex(), key.public_key().public_bytes_raw().hex()


def sign(mask: Mask, private: str) -> Mask:
    """The same mask with a signature over its tensors and metadata. Raises `InvalidName` if `private` is no key."""
    try:
        check_digest(private)
    except InvalidName:
        raise InvalidName("this is not a private key: 64 lower-case hex digits") from None  # which may be a secret
    key = _cryptography()[0].Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private))
    public = key.public_key().public_bytes_raw().hex()
    return replace(mask, signature=f"{_PREFIX}{public}:{key.sign(message(mask, 'everything')).hex()}")


def message(signed: Signable, covers: Cover) -> bytes:
    """The signed text (FORMAT.md, section 7)."""
    if covers == "tensors":
        return f"masquerade-signature/1\n{signed.digest}\n".encode()
    metadata = {item.name: getattr(signed.info, item.name) for item in fields(MaskInfo)}
    base = {"fingerprint": signed.base.fingerprint, "name": signed.base.name}
    return f"masquerade-signature/2\n{strictjson.dump({**metadata, 'base': base, 'digest': signed.digest})}\n".encode()


def examine(signed: Signable, trusted: Mapping[str, str]) -> Signature | None:
    """Check a mask's signature against the trusted keys (public key -> label); None if it is not signed."""
    if signed.signature is None:
        return None
    covers: Cover = "everything" if signed.signature.startswith(_PREFIX) else "tensors"
    public, _, value = signed.signature.removeprefix(_PREFIX).partition(":")
    try:
        valid = _fits(public, value, message(signed, covers))
    except SignatureError:
        valid = None
    return Signature(public, covers, valid, trusted.get(public))


def check(signed: Signable, trusted: Mapping[str, str], accept_tensors: bool = False) -> str:
    """The label of the trusted key that signed a mask, else SignatureError.

    A signature of version 1, which covers the tensors only, is refused unless `accept_tensors`.
    """
    found = examine(signed, trusted)
    subject = f"the mask {signed.digest[:16]}"
    if found is None:
        raise SignatureError(f"{subject} is not signed")
    if found.label is None:
        raise SignatureError(f"{subject} is signed by {found.key[:16]}, which is none of {len(trusted)} keys")
    if found.valid is None:
        _cryptography()
    if not found.valid:
        raise SignatureError(f"the signature of {found.label} does not fit {subject}")
    if found.covers == "tensors" and not accept_tensors:
        raise SignatureError(
            f"the signature of {found.label} covers only the tensors of {subject}, not its metadata; sign it again, or "
            "accept signatures of tensors"
        )
    return found.label


def rank(signed: Signable, trusted: Mapping[str, str]) -> Standing:
    """The standing of a copy's signature with the trusted keys."""
    found = examine(signed, trusted)
    if found is None:
        return Standing.UNKNOWN
    if found.valid is False:
        return Standing.FALSE
    if found.label is None or found.valid is None:
        return Standing.UNKNOWN
    return Standing.EVERYTHING if found.covers == "everything" else Standing.TENSORS


class TrustedKeys:
    """A text file of trusted public keys, a line `<64 hex digits> <label>` each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def trusted(self) -> dict[str, str]:
        """Public key -> label."""
        if not self.path.exists():
            return {}
        lines = [line for line in self.path.read_bytes().decode(errors="replace").splitlines() if line.strip()]
        matches = [_LINE.fullmatch(line) for line in lines]
        bad = [line for line, match in zip(lines, matches, strict=True) if match is None]
        if bad:
            raise SignatureError(f"{bad[0]!r:.80} is not a key and a label", path=self.path)
        return {match[1]: match[2] for match in matches if match}

    def trust(self, public: str, label: str) -> None:
        """Add a key, or give one another label."""
        key, name = check_digest(public, "public key"), check_name(label)
        with self._locked():
            self._write({**self.trusted(), key: name})

    def distrust(self, label: str) -> None:
        """Remove the keys of a label."""
        with self._locked():
            keys = self.trusted()
            kept = {public: name for public, name in keys.items() if name != label}
            if len(kept) == len(keys):
                raise MaskNotFound(f"no key of {label!r:.80} is trusted")
            self._write(kept)

    def _locked(self) -> AbstractContextManager[None]:
        return files.locked(self.path.with_name(f".{self.path.name}.lock"), TIMEOUT)

    def _write(self, keys: Mapping[str, str]) -> None:
        with files.replacing(self.path) as file:
            file.write("".join(f"{public} {label}\n" for public, label in keys.items()).encode())


def _cryptography() -> tuple[ModuleType, type[Exception]]:
    """The module of ed25519 keys, and what it raises for a signature that does not verify."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SignatureError("signatures need the package `cryptography`") from None
    return ed25519, InvalidSignature


def _fits(public: str, value: str, text: bytes) -> bool:
    """Whether a signature in hex is one of a text by a key."""
    ed25519, invalid = _cryptography()
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(value), text)
    except (invalid, ValueError):
        return False
    return True
