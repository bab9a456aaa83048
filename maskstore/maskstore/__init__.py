"""Masks as files: a format, a store and a registry of persona names. Needs numpy, not torch."""

from maskstore.compose import compose, compose_persona, open_served
from maskstore.delta import DeltaReader, write_delta
from maskstore.diff import Diff, Overlap, diff
from maskstore.errors import (
    BucketUnreachable,
    InvalidMaskValue,
    InvalidName,
    MaskConflict,
    MaskCorrupt,
    MaskError,
    MaskExists,
    MaskMismatch,
    MaskNotFound,
    SignatureError,
    StoreBusy,
    UnknownVersion,
)
from maskstore.fingerprint import BaseTensor, fingerprint, fingerprint_tensors, list_tensors
from maskstore.format import MaskReader, MaskWriter, read_mask, write_mask
from maskstore.mask import BaseRef, Mask, MaskInfo, majority
from maskstore.names import check_name
from maskstore.plot import plot
from maskstore.records import ANY, Anything, Certificate, Measurement, Persona, Revision
from maskstore.registry import Registry
from maskstore.store import Store
from maskstore.summary import Summary
from maskstore.target import Bitmap, Sparse, Target, encode
from maskstore.transfer import Exported, export_mask, import_mask, read_info
from maskstore.upkeep import Checkup, Collected, Finding, fsck, gc, sweep

__all__ = [
    "ANY",
    "Anything",
    "BaseRef",
    "BaseTensor",
    "Bitmap",
    "BucketUnreachable",
    "Certificate",
    "Checkup",
    "Collected",
    "DeltaReader",
    "Diff",
    "Exported",
    "Finding",
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
    "MaskWriter",
    "Measurement",
    "Overlap",
    "Persona",
    "Registry",
    "Revision",
    "SignatureError",
    "Sparse",
    "Store",
    "StoreBusy",
    "Summary",
    "Target",
    "UnknownVersion",
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
    "list_tensors",
    "majority",
    "open_served",
    "plot",
    "read_info",
    "read_mask",
    "sweep",
    "write_delta",
    "write_mask",
]
