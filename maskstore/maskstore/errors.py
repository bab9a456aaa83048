"""The errors of this package.

MaskError
├── InvalidName          a persona name, digest or module name that cannot be one
├── InvalidMaskValue     a value outside of its domain: gamma, phase, a shape, an expression
├── MaskNotFound         no such file, digest, name, alias or revision
├── Unreadable           the operating system does not let the file be read: permission, handles, the disk
├── MaskExists           the name is taken
├── MaskConflict         compare-and-swap failed: another revision was published in between
├── MaskMismatch         the mask is fine and does not fit: another base, another module shape
├── UnknownVersion       a mask of a format this reader does not know
├── SignatureError       unsigned, signed by an untrusted key, or the signature does not verify
├── StoreBusy            another process held the store for too long
├── BucketUnreachable    the bucket of a store cannot be reached, or refuses
└── MaskCorrupt          the bytes are not a mask, or no longer the mask they were
    ├── NotAMask         not a regular file, or safetensors of something else
    ├── MaskTruncated    the file ends before the tensors do
    ├── HeaderCorrupt    header too large, not strict JSON, a value out of its domain
    ├── SealMismatch     the header is not the one that was written (a flipped bit)
    ├── TensorSet        a tensor is missing or one too many
    ├── TensorShape      wrong dtype or shape
    ├── TensorOffsets    tensors overlap, leave gaps, are misaligned or leave bytes behind
    ├── PadBits          a bit beyond the last column is set
    ├── ColumnOrder      pruned columns unsorted, repeated or out of range
    ├── GapsCorrupt      gaps of a sparse module that do not decode
    ├── DigestMismatch   a tensor is not the one that was written (a flipped bit)
    └── DeltaCorrupt     a delta that does not decode
"""

from pathlib import Path
from typing import Self


class MaskError(Exception):
    """Base of the errors of this package; `path` and `tensor` locate the fault where they are known."""

    def __init__(self, message: str, path: Path | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor

    def at(self, path: Path | None = None, tensor: str | None = None) -> Self:
        """Set `path` and `tensor` unless they are set."""
        self.path = self.path or path
        self.tensor = self.tensor or tensor
        return self

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.path, self.tensor, self.message) if part)


class InvalidName(MaskError):
    """Not a possible persona name, digest or module name."""


class InvalidMaskValue(MaskError):
    """A value outside of its domain."""


class MaskNotFound(MaskError):
    """Nothing is there under this name, digest or path."""


class Unreadable(MaskError):
    """The file cannot be read now; it may be sound."""


class MaskExists(MaskError):
    """The name is taken."""


class MaskConflict(MaskError):
    """Compare-and-swap failed; `actual` is the digest that is current now (None: the name does not exist)."""

    def __init__(self, message: str, actual: str | None = None) -> None:
        super().__init__(message)
        self.actual = actual


class MaskMismatch(MaskError):
    """A sound mask for something else: another base, or modules of another shape."""


class UnknownVersion(MaskError):
    """A mask of a later or foreign format version."""


class SignatureError(MaskError):
    """A signature is required and missing, unknown or wrong."""


class StoreBusy(MaskError):
    """Another process held the store's lock or its registry for longer than the timeout."""


class BucketUnreachable(MaskError):
    """The bucket of a store cannot be reached, or refuses; nothing was changed, or that is not known."""


class MaskCorrupt(MaskError):
    """The bytes are not a sound mask."""


class NotAMask(MaskCorrupt):
    """Not a regular file, or a file of another kind."""


class MaskTruncated(MaskCorrupt):
    """The file ends too early."""


class HeaderCorrupt(MaskCorrupt):
    """The header breaks a rule of the format."""


class SealMismatch(MaskCorrupt):
    """The header's checksum is not the recorded one."""


class TensorSet(MaskCorrupt):
    """A tensor is missing, or there is one too many."""


class TensorShape(MaskCorrupt):
    """A tensor has the wrong dtype or shape."""


class TensorOffsets(MaskCorrupt):
    """Tensors overlap, leave a gap, are misaligned, or bytes follow the last one."""


class PadBits(MaskCorrupt):
    """A pad bit beyond the last column is not zero."""


class ColumnOrder(MaskCorrupt):
    """Row offsets fall, or columns are unsorted, repeated or out of range."""


class GapsCorrupt(MaskCorrupt):
    """Gaps of a sparse module that do not decode into its pruned weights."""


class DigestMismatch(MaskCorrupt):
    """Recorded and computed digest differ."""


class DeltaCorrupt(MaskCorrupt):
    """A delta that does not decode into a mask."""
