"""Who vouches for a mask: ed25519 over its digest, and the keys a store trusts. Knows no file but the list of keys.

A signature covers the base and the pruned sets; it does not cover what the mask says about itself.
The arithmetic is the package `cryptography`, imported only when something is signed or checked.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from maskstore import files
from maskstore.errors import MaskNotFound, SignatureError
from maskstore.mask import Mask
from maskstore.names import check_digest, check_name

DOMAIN = "masquerade-signature/1"
_LINE = re.compile(r"([0-9a-f]{64}) (\S+)")


def generate() -> tuple[str, str]:
    """A new (private, public) key, 64 hex digits each."""
    key = _cryptography()[0].Ed25519PrivateKey.generate()
    return key.private_bytes_raw().hex(), key.public_key().public_bytes_raw().hex()


def sign(mask: Mask, private: str) -> Mask:
    """The same mask, signed."""
    key = _cryptography()[0].Ed25519PrivateKey.from_private_bytes(bytes.fromhex(check_digest(private, "private key")))
    public = key.public_key().public_bytes_raw().hex()
    return replace(mask, signature=f"{public}:{key.sign(_message(mask.digest)).hex()}")


def check(digest: str, signature: str | None, trusted: Mapping[str, str]) -> str:
    """The label of the trusted key (public key -> label) that signed a digest, else SignatureError."""
    if signature is None:
        raise SignatureError(f"the mask {digest[:16]} is not signed")
    public, _, value = signature.partition(":")
    if public not in trusted:
        raise SignatureError(f"the mask {digest[:16]} is signed by {public[:16]}, which is none of {len(trusted)} keys")
    ed25519, invalid = _cryptography()
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(value), _message(digest))
    except (invalid, ValueError):
        raise SignatureError(f"the signature of {trusted[public]} does not fit the mask {digest[:16]}") from None
    return trusted[public]


class TrustedKeys:
    """A text file of trusted public keys, a line `<64 hex digits> <label>` each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def trusted(self) -> dict[str, str]:
        """Public key -> label."""
        if not self.path.exists():
            return {}
        lines = [line for line in self.path.read_text().splitlines() if line.strip()]
        matches = [_LINE.fullmatch(line) for line in lines]
        bad = [line for line, match in zip(lines, matches, strict=True) if match is None]
        if bad:
            raise SignatureError(f"{bad[0]!r:.80} is not a key and a label", path=self.path)
        return {match[1]: match[2] for match in matches if match}

    def trust(self, public: str, label: str) -> None:
        """Add a key, or give one another label."""
        self._write({**self.trusted(), check_digest(public, "public key"): check_name(label)})

    def distrust(self, label: str) -> None:
        """Remove the keys of a label."""
        keys = self.trusted()
        kept = {public: name for public, name in keys.items() if name != label}
        if len(kept) == len(keys):
            raise MaskNotFound(f"no key of {label!r:.80} is trusted")
        self._write(kept)

    def _write(self, keys: Mapping[str, str]) -> None:
        with files.replacing(self.path) as file:
            file.write("".join(f"{public} {label}\n" for public, label in keys.items()).encode())


def _cryptography() -> tuple[ModuleType, type[Exception]]:
    """The module of ed25519 keys, and what it raises for a signature that does not fit."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SignatureError("signatures need the package `cryptography`") from None
    return ed25519, InvalidSignature


def _message(digest: str) -> bytes:
    return f"{DOMAIN}\n{digest}\n".encode()
