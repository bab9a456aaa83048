"""The header of a mask or delta file: bytes <-> metadata and modules.

`decode` validates all of an untrusted file except the tensors' content.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from maskstore import layout, metadata, strictjson
from maskstore.errors import (
    HeaderCorrupt,
    InvalidMaskValue,
    InvalidName,
    MaskTruncated,
    NotAMask,
    SealMismatch,
    TensorOffsets,
    TensorSet,
    TensorShape,
    UnknownVersion,
)
from maskstore.layout import Module, Sets, Tensor
from maskstore.mask import FORMAT, BaseRef, MaskInfo
from maskstore.names import check_digest, check_module
from maskstore.target import GAPS_LIMIT, check_shape, has_gaps

# Format -> the sets of tensors that a module may have. Version 2 adds gaps; a file without gaps is of version 1.
_SETS: dict[str, Sets] = {
    FORMAT: layout.MASK,
    "masquerade-mask/2": layout.MASK + layout.GAPS,
    "masquerade-delta/1": layout.MASK + layout.FLIPS,
    "masquerade-delta/2": layout.MASK + layout.FLIPS + layout.GAPS,
}
PREFIX = 8
ALIGNMENT = 64
HEADER_LIMIT = 4 << 20
MODULE_LIMIT = 8192
COUNT_LIMIT = 1 << 80  # of bytes and of the sides of a tensor, so that Python prints their product
ROW_LIMIT = 1 << 25  # rows of all modules in gaps: their offsets take memory that the file does not have
_BLANK = "0" * 64
_SEAL = re.compile(rb'"seal":"([0-9a-f]{64})"')
_SIGNATURE = re.compile(r"(?:2:)?[0-9a-f]{64}:[0-9a-f]{128}")
_INFO = tuple(item.name for item in fields(MaskInfo))
_JSON = (*_INFO, "base", "modules")
_REQUIRED = {*_JSON, "format", "digest", "seal"}


@dataclass(frozen=True)
class Header:
    """All of a file before its tensors. A delta has a parent; `start` is the first byte of the tensors.

    `faults` are the errors that a lenient reader found in objects of the metadata; those are empty in `info`.
    """

    base: BaseRef
    info: MaskInfo
    digest: str
    modules: Mapping[str, Module]
    signature: str | None = None
    parent: str | None = None
    start: int = 0
    faults: tuple[str, ...] = ()


def encode(header: Header) -> bytes:
    """The first bytes of the file, sealed and padded with spaces to a multiple of 64; the same for the same header."""
    _check_rows(header.modules)
    modules = {name: _entry(module) for name, module in header.modules.items()}
    values = {name: getattr(header.info, name) for name in _INFO}
    base = {"fingerprint": header.base.fingerprint, "name": header.base.name}
    texts = {key: strictjson.dump(value) for key, value in {**values, "base": base, "modules": modules}.items()}
    texts |= {"format": _format(header), "digest": header.digest, "seal": _BLANK}
    texts |= {key: text for key in ("parent", "signature") if (text := getattr(header, key)) is not None}
    document: dict[str, Any] = {"__metadata__": texts}
    for tensor, name, suffix in layout.order(header.modules):
        document[f"{name}.{suffix}"] = {
            "dtype": layout.CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    raw = strictjson.dump(document).encode()
    raw += b" " * (-(len(raw) + PREFIX) % ALIGNMENT)
    if len(raw) > HEADER_LIMIT:
        raise HeaderCorrupt(f"the header would take {len(raw)} bytes, the limit is {HEADER_LIMIT}")
    sealed = raw.replace(_line(_BLANK), _line(hashlib.sha256(raw).hexdigest()))
    return len(raw).to_bytes(PREFIX, "little") + sealed


def _format(header: Header) -> str:
    kind, version = "delta" if header.parent else "mask", 1 + any(map(_is_coded, header.modules.values()))
    return f"masquerade-{kind}/{version}"


def _is_coded(module: Module) -> bool:
    return "gaps" in module.tensors


def _entry(module: Module) -> list[Any]:
    entry = [module.out, module.columns, module.sha256]
    return [*entry, module.pruned] if _is_coded(module) else entry


def check_length(prefix: bytes, size: int) -> int:
    """The header's length from the first nine bytes of a file of `size` bytes."""
    if len(prefix) < PREFIX:
        raise MaskTruncated(f"the file has {size} bytes, the length of the header alone takes {PREFIX}")
    if prefix[PREFIX:] not in (b"{", b""):
        raise NotAMask(f"byte {PREFIX} is {prefix[PREFIX:]!r}, not {{: this is no safetensors file")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > HEADER_LIMIT:
        raise HeaderCorrupt(f"the header claims {length} bytes, the limit is {HEADER_LIMIT}")
    if PREFIX + length > size:
        raise MaskTruncated(f"the file ends after {size} bytes, inside a header of {length}")
    return length


def decode(raw: bytes, size: int, lenient: bool = False) -> Header:
    """The header from its bytes (without the length prefix) in a file of `size` bytes, or a MaskError.

    A lenient reader is for files that an older version accepted into a store: an object of the metadata with a value of
    the wrong type is read as empty.
    """
    sealed = _check_seal(raw)
    document = _object(strictjson.parse(_text(raw), "the header"), "the header")
    texts = _object(document.pop("__metadata__", {}), "__metadata__")
    _check_format(texts)
    if not sealed:
        raise SealMismatch(f"the header bears no seal: {texts['seal']!r:.80} is not 64 hex digits, once")
    values = {key: strictjson.parse(texts[key], key) for key in _JSON}
    values, faults = metadata.mend(values) if lenient else (values, ())
    tensors = {name: _tensor(name, entry) for name, entry in document.items()}
    start = PREFIX + len(raw)
    try:
        modules = _modules(values["modules"], _SETS[texts["format"]], tensors)
        layout.check_offsets(modules, start, size)
        base, info = _base(values["base"]), MaskInfo(**{name: values[name] for name in _INFO})
        parent = check_digest(texts["parent"], "parent digest") if "parent" in texts else None
        digest, signature = check_digest(texts["digest"]), check_signature(texts.get("signature"))
    except (InvalidName, InvalidMaskValue) as error:
        raise HeaderCorrupt(error.message) from None
    return Header(base, info, digest, modules, signature, parent, start, faults)


def check_signature(signature: str | None) -> str | None:
    """The signature if it has the form `2:<public key>:<signature>` or, of version 1, `<public key>:<signature>`, in
    hex; None stays None. Nothing is verified here.
    """
    if signature is not None and not _SIGNATURE.fullmatch(signature):
        raise HeaderCorrupt(f"signature {signature!r:.80} is not `2:` and 64 and 128 hex digits around a colon")
    return signature


def _line(seal: str) -> bytes:
    return f'"seal":"{seal}"'.encode()


def _check_seal(raw: bytes) -> bool:
    """Check the seal first: if it is intact, every later error is the writer's. False if there is no seal."""
    seals = _SEAL.findall(raw)
    if len(seals) != 1:
        return False
    recorded = seals[0].decode()
    computed = hashlib.sha256(raw.replace(_line(recorded), _line(_BLANK))).hexdigest()
    if computed != recorded:
        raise SealMismatch(f"the header is damaged: sealed {recorded[:16]}, computed {computed[:16]}")
    return True


def _text(raw: bytes) -> str:
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise HeaderCorrupt(f"byte {error.start} of the header is not ASCII") from None


def _check_format(texts: dict[str, Any]) -> None:
    """Format, version and the exact set of keys; all values are strings."""
    found = texts.get("format")
    if not isinstance(found, str) or not found.startswith(("masquerade-mask/", "masquerade-delta/")):
        raise NotAMask(f"safetensors without masks: format is {found!r:.40}, expected {FORMAT!r}")
    if found not in _SETS:
        raise UnknownVersion(f"format {found!r:.40} is not known here, this reader knows {', '.join(_SETS)}")
    required = _REQUIRED | {"parent"} if found.startswith("masquerade-delta/") else _REQUIRED
    missing = sorted(required - texts.keys())
    extra = sorted(texts.keys() - required - {"signature"})
    if missing or extra:
        raise HeaderCorrupt(f"metadata keys: missing {missing}, unknown {extra!s:.160}")
    wrong = sorted(key for key, value in texts.items() if not isinstance(value, str))
    if wrong:
        raise HeaderCorrupt(f"metadata values that are not strings: {wrong}")


def _base(value: Any) -> BaseRef:
    entry = _object(value, "base")
    if entry.keys() != {"fingerprint", "name"}:
        raise HeaderCorrupt(f"base has the keys {sorted(entry)!s:.80}, expected fingerprint and name")
    return BaseRef(entry["fingerprint"], entry["name"])


def _tensor(name: str, value: Any) -> tuple[Tensor, int]:
    """A tensor and the offset of its claimed end."""
    entry = _object(value, f"the entry of {name:.80}")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderCorrupt(f"keys {sorted(entry)!s:.80}, expected data_offsets, dtype and shape", tensor=name)
    dtype = layout.DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise TensorShape(f"dtype {entry['dtype']!r:.40} is none of {', '.join(layout.DTYPES)}", tensor=name)
    shape, offsets = _counts(entry["shape"], "shape", name), _counts(entry["data_offsets"], "data_offsets", name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorOffsets(f"data_offsets {list(offsets)} are not a begin and an end", tensor=name)
    return Tensor(dtype, shape, offsets[0]), offsets[1]


def _counts(value: Any, what: str, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 2 or any(type(item) is not int or item < 0 for item in value):
        raise HeaderCorrupt(f"{what} {value!r:.60} is not one or two counts", tensor=name)
    if max(value, default=0) > COUNT_LIMIT:
        raise HeaderCorrupt(f"{what} has a count above {COUNT_LIMIT}", tensor=name)
    return tuple(value)


def _modules(value: Any, sets: Sets, found: dict[str, tuple[Tensor, int]]) -> dict[str, Module]:
    """Match the declared modules with the tensors found: none missing, none extra, each as its module implies."""
    declared = _object(value, "modules")
    if not 1 <= len(declared) <= MODULE_LIMIT:
        raise HeaderCorrupt(f"{len(declared)} modules, 1 to {MODULE_LIMIT} are possible")
    modules = {}
    for name, entry in sorted(declared.items()):
        out, columns, sha256, *counts = _module(name, entry)
        module = Module(out, columns, sha256, layout.take(name, (out, columns), sets, found))
        modules[name] = replace(module, pruned=_pruned(name, module, counts))
    if found:
        raise TensorSet(f"belongs to no module ({len(found)} such tensors)", tensor=min(found))
    _check_rows(modules)
    return modules


def _module(name: str, value: Any) -> tuple[Any, ...]:
    """(out, in, sha256), with the count of pruned weights if there is one."""
    try:
        check_module(name)
        out, columns, sha256, *counts = value
        if any(type(count) is not int for count in (out, columns, *counts)) or len(counts) > 1:
            raise ValueError
        check_digest(sha256)
    except (InvalidName, TypeError, ValueError):
        expected = "name: [out, in, sha256] or, in gaps, name: [out, in, sha256, pruned]"
        raise HeaderCorrupt(f"module {name!r:.80} is {value!r:.120}, expected {expected}") from None
    return *check_shape(out, columns), sha256, *counts


def _pruned(name: str, module: Module, counts: list[int]) -> int | None:
    """How many weights a module prunes, where its entry or its columns tell."""
    if len(counts) != _is_coded(module):
        fault = "is in gaps and does not count" if not counts else "is not in gaps and counts"
        raise HeaderCorrupt(f"module {name!r:.80} {fault} its pruned weights")
    if not counts:
        return module.tensors["cols"].shape[0] if "cols" in module.tensors else None
    if counts[0] < 0 or not has_gaps(module.out, module.columns, counts[0]):
        limit = f"0 to {GAPS_LIMIT}, fewer than make the bitmap of {module.out} x {module.columns} smaller"
        raise HeaderCorrupt(f"module {name!r:.80} in gaps counts {counts[0]} pruned weights, possible are {limit}")
    return counts[0]


def _check_rows(modules: Mapping[str, Module]) -> None:
    rows = sum(module.out for module in modules.values() if _is_coded(module))
    if rows > ROW_LIMIT:
        raise HeaderCorrupt(f"the modules in gaps have {rows} rows, the limit is {ROW_LIMIT}")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HeaderCorrupt(f"{what} is a {type(value).__name__}, expected an object")
    return value
