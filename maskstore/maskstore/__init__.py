"""Masks as files: a format, a store and a registry of persona names. Needs numpy, not torch."""

from maskstore.compose import compose, compose_persona
from maskstore.delta import DeltaReader, write_delta
from maskstore.diff import Diff, Overlap, diff
from maskstore.errors import (
    ColumnOrder,
    DeltaCorrupt,
    DigestMismatch,
    HeaderCorrupt,
    InvalidMaskValue,
    InvalidName,
    MaskConflict,
    MaskCorrupt,
    MaskError,
    MaskExists,
    MaskMismatch,
    MaskNotFound,
    MaskTruncated,
    NotAMask,
    PadBits,
    SealMismatch,
    SignatureError,
    StoreBusy,
    TensorOffsets,
    TensorSet,
    TensorShape,
    UnknownVersion,
    Unreadable,
)
from maskstore.fingerprint import BaseTensor, fingerprint, fingerprint_tensors
from maskstore.format import MaskReader, MaskWriter, read_mask, write_mask
from maskstore.mask import BaseRef, Mask, MaskInfo, majority
from maskstore.names import check_name
from maskstore.plot import plot
from maskstore.records import ANY, Anything, Certificate, Measurement, Persona, Revision
from maskstore.registry import Registry
from maskstore.store import Store
from maskstore.summary import Summary
from maskstore.target import Bitmap, Sparse, Target, encode
from maskstore.transfer import Exported, export_mask, import_mask
from maskstore.upkeep import Checkup, Collected, Finding, fsck, gc, sweep

__all__ = [
    "ANY",
    "Anything",
    "BaseRef",
    "BaseTensor",
    "Bitmap",
    "Certificate",
    "Checkup",
    "Collected",
    "ColumnOrder",
    "DeltaCorrupt",
    "DeltaReader",
    "Diff",
    "DigestMismatch",
    "Exported",
    "Finding",
    "HeaderCorrupt",
    "InvalidMaskValue",
    "InvalidName",
    "Mask",
    "MaskConflict",
    "MaskCorrupt",
    "MaskError",
    "MaskExists",
    "MaskInfo",
    "MaskMismatch",
    "MaskNotFound",
    "MaskReader",
    "MaskTruncated",
    "MaskWriter",
    "Measurement",
    "NotAMask",
    "Overlap",
    "PadBits",
    "Persona",
    "Registry",
    "Revision",
    "SealMismatch",
    "SignatureError",
    "Sparse",
    "Store",
    "StoreBusy",
    "Summary",
    "Target",
    "TensorOffsets",
    "TensorSet",
    "TensorShape",
    "UnknownVersion",
    "Unreadable",
    "check_name",
    "compose",
    "compose_persona",
    "diff",
    "encode",
    "export_mask",
    "fingerprint",
    "fingerprint_tensors",
    "fsck",
    "gc",
    "import_mask",
    "majority",
    "plot",
    "read_mask",
    "sweep",
    "write_delta",
    "write_mask",
]
