"""Take mask files apart and put them together wrongly. Uses nothing of the package."""

import hashlib
import json
import struct
from collections.abc import Callable
from itertools import accumulate

Document = dict
BLANK = "0" * 64


def split(raw: bytes) -> tuple[Document, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def seal(text: str, alignment: int = 64) -> bytes:
    """A header text whose seal is blank -> prefix and header, sealed."""
    header = text.encode()
    header += b" " * (-(len(header) + 8) % alignment)
    digest = hashlib.sha256(header).hexdigest()
    return struct.pack("<Q", len(header)) + header.replace(f'"seal":"{BLANK}"'.encode(), f'"seal":"{digest}"'.encode())


def join(document: Document, data: bytes, alignment: int = 64) -> bytes:
    if "seal" in document.get("__metadata__", {}):
        document["__metadata__"]["seal"] = BLANK
    return seal(json.dumps(document, sort_keys=True, separators=(",", ":")), alignment) + data


def edit(raw: bytes, change: Callable[[Document], object]) -> bytes:
    """The file with its header changed and sealed again: what a deliberate forger writes."""
    document, data = split(raw)
    change(document)
    return join(document, data)


def edit_json(raw: bytes, key: str, change: Callable[[dict], object]) -> bytes:
    """The file with one JSON metadata value changed in place."""

    def apply(document: Document) -> None:
        value = json.loads(document["__metadata__"][key])
        change(value)
        document["__metadata__"][key] = json.dumps(value, sort_keys=True, separators=(",", ":"))

    return edit(raw, apply)


def rehash(document: Document, data: bytes) -> None:
    """Make every recorded sha256 and the digest fit the data, as somebody would who builds a bad mask on purpose."""
    metadata = document["__metadata__"]
    modules = json.loads(metadata["modules"])
    lines = ["masquerade-mask/1", json.loads(metadata["base"])["fingerprint"]]
    for name in sorted(modules):
        suffixes = next(each for each in (["keep"], ["gaps"], ["rows", "cols"]) if f"{name}.{each[0]}" in document)
        spans = [document[f"{name}.{suffix}"]["data_offsets"] for suffix in suffixes]
        content = b"".join(data[begin:end] for begin, end in spans)
        if suffixes == ["gaps"]:
            content = unfold(content, *modules[name][:2], modules[name][3])
        modules[name][2] = hashlib.sha256(content).hexdigest()
        kind = "bitmap" if suffixes == ["keep"] else "sparse"
        lines.append(f"{name} {kind} {modules[name][0]} {modules[name][1]} {modules[name][2]}")
    metadata["modules"] = json.dumps(modules, sort_keys=True, separators=(",", ":"))
    metadata["digest"] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def unfold(gaps: bytes, out: int, columns: int, count: int) -> bytes:
    """The rows and columns that gaps stand for (FORMAT.md, section 4), or what comes next to it of unsound ones."""
    flags = "".join(f"{byte:08b}"[::-1] for byte in gaps)
    width = (out * columns // count).bit_length() - 1 if count else 0
    quotients = [len(zeros) for zeros in flags[count * width :].split("1")[:-1]]
    place, counts, cols = -1, [0] * out, b""
    for at, quotient in enumerate(quotients):
        remainder = int("0" + flags[at * width : (at + 1) * width][::-1], 2)
        place += (quotient << width) + remainder + 1
        counts[place // columns % out] += 1
        cols += struct.pack("<H" if columns <= 65536 else "<I", place % columns)
    return struct.pack(f"<{out + 1}i", 0, *accumulate(counts)) + cols


def patch(raw: bytes, tensor: str, change: Callable[[bytearray], object]) -> bytes:
    """The file with a tensor's bytes changed (same length) and every digest made to fit."""
    document, data = split(raw)
    begin, end = document[tensor]["data_offsets"]
    content = bytearray(data[begin:end])
    change(content)
    data = data[:begin] + bytes(content) + data[end:]
    rehash(document, data)
    return join(document, data)
