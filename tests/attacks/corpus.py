"""Hostile files, each with the error that must refuse it. `python -m tests.attacks.corpus FOLDER` writes them out.

Built from one sound mask by a forger who knows the format: checksums and digests fit unless they are the point.
"""

import io
import json
import os
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import maskstore
from maskstore import MaskError, errors
from tests.maskstore import forge, world

DOWN = "model.layers.0.mlp.down_proj"  # a bitmap, 24 x 100
OUT = "model.layers.0.self_attn.o_proj"  # sparse, 16 x 64
LIMIT = 4 << 20
# Values of the wrong type: where the refusal says it is -> an object of the metadata, and what it is replaced with
WRONG = {
    "ancestry.parents": ("ancestry", {"parents": ["a"]}),
    "a key of ancestry.parents": ("ancestry", {"parents": {"a": "b"}}),
    "ancestry.expression": ("ancestry", {"expression": 3}),
    "certificate.passed": ("certificate", {"passed": "yes"}),
    "certificate.flip": ("certificate", {"flip": "1.0"}),
    "certificate.kl": ("certificate", {"kl": 10**400}),
    "certificate.verdict": ("certificate", {"verdict": 1}),
    "certificate.changed_answers.share": ("certificate", {"changed_answers": {"changed": 1, "of": 2, "share": None}}),
    "certificate.pairs": ("certificate", {"pairs": True}),
    "certificate.preferred": ("certificate", {"preferred": {"base": 0.5}}),
    "certificate.preferred.masked": ("certificate", {"preferred": {"base": 0.5, "masked": None}}),
    "certificate.intervals.flip": ("certificate", {"intervals": {"flip": [0.1]}}),
    "certificate.intervals": ("certificate", {"intervals": [1]}),
    "certificate.phases.all": ("certificate", {"phases": {"all": 1}}),
    "certificate.phases.all.flip": ("certificate", {"phases": {"all": {"flip": []}}}),
    "certificate.reasons": ("certificate", {"reasons": "none"}),
    "certificate.remarks[1]": ("certificate", {"remarks": ["x", 1]}),
    "certificate.choice.tried[0]": ("certificate", {"choice": {"tried": [1]}}),
    "certificate.curve": ("certificate", {"curve": {"0.5": {}}}),
    "certificate.curve[0] lacks gamma": ("certificate", {"curve": [{"own_ratio": 1.0}]}),
    "certificate.curve[1].gamma": ("certificate", {"curve": [{"gamma": 0.5}, {"gamma": -1}]}),
    "certificate.curve[0].neutral_ratio": ("certificate", {"curve": [{"gamma": 0.5, "neutral_ratio": "1"}]}),
    "certificate.facts lacks known, of": ("certificate", {"facts": {"kept": 1.0}}),
    "certificate.loops.masked": ("certificate", {"loops": {"masked": None, "base": 0.0, "of": 24}}),
    "certificate.margin_shift_median": ("certificate", {"margin_shift_median": []}),
    "certificate.phase.default": ("certificate", {"phase": {"default": "prefill"}}),
    "certificate.pruned_share.x": ("certificate", {"pruned_share": {"x": "y"}}),
    "certificate holds half of a surrogate pair": ("certificate", {"x": "\ud800"}),
    "calibration.examples": ("calibration", {"examples": -1}),
    "calibration.contrast": ("calibration", {"contrast": []}),
    "calibration.system_prompt": ("calibration", {"system_prompt": "x"}),
    "calibration.system_prompt.tokens": ("calibration", {"system_prompt": {"text": "x", "tokens": "y"}}),
    "parameters.rho": ("parameters", {"rho": [1]}),
    "parameters.scope": ("parameters", {"scope": 1}),
}


@dataclass(frozen=True)
class Attack:
    """A file's content, or how to put something else at its path."""

    name: str
    error: type[MaskError]
    content: bytes = b""
    plant: Callable[[Path], object] | None = None

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.safetensors"
        if self.plant:
            self.plant(path)
        else:
            path.write_bytes(self.content)
        return path


def sound() -> bytes:
    """A bitmap, and sparse modules as rows and columns."""
    return _written(world.write_rows, world.mixed())


def coded() -> bytes:
    """A bitmap, and sparse modules as gaps."""
    return _written(maskstore.write_mask, world.mixed())


def _written(write: Callable[[maskstore.Mask, Path], object], mask: maskstore.Mask) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write(mask, path)
        return path.read_bytes()


def attacks() -> Iterator[Attack]:
    raw = sound()
    for family in (
        truncated,
        flipped,
        lengths,
        texts,
        bombs,
        metadata,
        tensors,
        offsets,
        contents,
        other_files,
        not_files,
    ):
        yield from family(raw)
    yield from gaps(coded())


def truncated(raw: bytes) -> Iterator[Attack]:
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(raw) - 64, len(raw) - 1):
        yield Attack(f"truncated-{length}", errors.MaskTruncated, raw[:length])


def flipped(raw: bytes) -> Iterator[Attack]:
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for at in (9, 60, header // 2, header - 1):
        yield Attack(f"flipped-header-{at}", errors.SealMismatch, _flip(raw, at))
    for at in (header, header + 200, len(raw) - 1):
        yield Attack(f"flipped-data-{at}", errors.DigestMismatch, _flip(raw, at))
    yield Attack("flipped-brace", errors.NotAMask, _flip(raw, 8))
    yield Attack("flipped-length", errors.MaskTruncated, _flip(raw, 2))


def _flip(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def lengths(raw: bytes) -> Iterator[Attack]:
    for name, length in (("2-63", 2**63), ("2-64-1", 2**64 - 1), ("limit-1", LIMIT + 1), ("4-gib", 1 << 32)):
        yield Attack(f"length-{name}", errors.HeaderCorrupt, struct.pack("<Q", length) + raw[8:])
    yield Attack("length-limit-short-file", errors.MaskTruncated, struct.pack("<Q", LIMIT) + raw[8:])
    yield Attack("length-zero", errors.HeaderCorrupt, struct.pack("<Q", 0) + raw[8:])
    yield Attack(
        "length-eight-less", errors.SealMismatch, struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 8) + raw[8:]
    )
    yield Attack("length-misaligned", errors.TensorOffsets, forge.join(*forge.split(raw), alignment=1))


def texts(raw: bytes) -> Iterator[Attack]:
    """Headers that are not the JSON they should be, sealed all the same."""
    document, data = forge.split(raw)
    document["__metadata__"]["seal"] = forge.BLANK
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    corrupt = errors.HeaderCorrupt

    def replaced(old: str, new: str) -> bytes:
        assert old in text, old
        return forge.seal(text.replace(old, new, 1)) + data

    yield Attack("json-cut", corrupt, forge.seal(text[:-1]) + data)
    yield Attack("json-twice", corrupt, forge.seal(text + "{}") + data)
    yield Attack("json-array", errors.NotAMask, forge.seal(f"[{text}]") + data)
    yield Attack("json-trailing-nul", corrupt, forge.seal(text + "\x00") + data)
    yield Attack("json-utf8", corrupt, replaced("pirate", "pirät"))
    yield Attack("json-utf16", errors.NotAMask, struct.pack("<Q", 2 * len(text) + 2) + text.encode("utf-16") + data)
    yield Attack("json-bom", errors.NotAMask, forge.seal("\ufeff" + text) + data)
    yield Attack("json-comment", corrupt, replaced("{", "{/**/"))
    yield Attack("json-nan-shape", corrupt, replaced('"shape":[', '"shape":[NaN,'))
    yield Attack("json-infinity", corrupt, replaced('"shape":[', '"shape":[Infinity,'))
    yield Attack("json-float-shape", corrupt, replaced('"shape":[24', '"shape":[24.0'))
    yield Attack("json-long-number", corrupt, replaced('"shape":[24', '"shape":[' + "9" * 100_000))
    yield Attack("json-duplicate-tensor", corrupt, replaced(f'"{OUT}.rows"', f'"{OUT}.cols"'))
    yield Attack("json-duplicate-field", corrupt, replaced('"dtype":"U8"', '"dtype":"U8","dtype":"U8"'))
    yield Attack("json-duplicate-metadata", corrupt, replaced("{", '{"__metadata__":{},'))
    yield Attack("json-surrogate", corrupt, replaced('"persona":"\\"pirate\\""', '"persona":"\\"\\ud800\\""'))
    yield Attack("seal-twice", corrupt, replaced('"score":', f'"seal":"{forge.BLANK}","score":'))
    yield Attack("seal-upper-case", errors.SealMismatch, replaced(f'"seal":"{forge.BLANK}"', f'"seal":"{"A" * 64}"'))


def bombs(raw: bytes) -> Iterator[Attack]:
    """Small files that would be large in memory or slow to refuse."""
    corrupt = errors.HeaderCorrupt
    room = LIMIT - 16

    def header(text: str) -> bytes:
        text = text[:room]
        return struct.pack("<Q", len(text)) + text.encode()

    yield Attack("bomb-deep-arrays", corrupt, header('{"a":' + "[" * room))
    yield Attack("bomb-deep-objects", corrupt, header('{"a":' * (room // 5)))
    yield Attack("bomb-deep-thousand", corrupt, header('{"a":' + "[" * 1000 + "]" * 1000 + "}"))
    yield Attack("bomb-commas", corrupt, header('{"a":[' + "0," * room))
    yield Attack("bomb-empty-arrays", corrupt, header('{"a":[' + "[]," * (room // 3)))
    yield Attack("bomb-keys", errors.NotAMask, header("{" + ",".join(f'"{at}":0' for at in range(199_000)) + "}"))
    yield Attack("bomb-same-key", corrupt, header("{" + ",".join(['"a":0'] * 199_000) + "}"))
    yield Attack("bomb-string", corrupt, header('{"' + "a" * room))
    yield Attack("bomb-escaped-quotes", corrupt, header('{"' + '\\"' * (room // 2)))
    yield Attack("bomb-backslashes", corrupt, header('{"' + "\\" * room))
    yield Attack("bomb-digits", corrupt, header('{"a":' + "9" * room))
    yield Attack("bomb-exponent", errors.NotAMask, header('{"a":1e' + "9" * 4000 + "}"))
    yield Attack("bomb-seals", corrupt, header("{" + f'"seal":"{forge.BLANK}",' * 50_000))
    deep = "[" * 500 + "]" * 500
    yield Attack(
        "bomb-deep-metadata", corrupt, forge.edit(raw, lambda d: d["__metadata__"].update(parameters=f'{{"a":{deep}}}'))
    )
    wide = json.dumps({f"m{at}": [1, 1, "0" * 64] for at in range(9000)})
    yield Attack("bomb-modules", corrupt, forge.edit(raw, lambda d: d["__metadata__"].update(modules=wide)))
    long = "a" * 3_000_000
    yield Attack("bomb-persona", corrupt, forge.edit(raw, lambda d: d["__metadata__"].update(persona=f'"{long}"')))


def metadata(raw: bytes) -> Iterator[Attack]:
    corrupt = errors.HeaderCorrupt

    def said(name: str, error: type[MaskError] = corrupt, **values: object) -> Attack:
        return Attack(f"metadata-{name}", error, forge.edit(raw, lambda d: d["__metadata__"].update(values)))

    yield Attack("metadata-none", errors.NotAMask, forge.edit(raw, lambda d: d.pop("__metadata__")))
    yield Attack("metadata-list", corrupt, forge.edit(raw, lambda d: d.update(__metadata__=[])))
    yield Attack("metadata-missing", corrupt, forge.edit(raw, lambda d: d["__metadata__"].pop("certificate")))
    yield said("unknown-key", note='"x"')
    yield said("format-foreign", errors.NotAMask, format="pt")
    yield said("format-later", maskstore.UnknownVersion, format="masquerade-mask/3")
    yield said("format-negative", maskstore.UnknownVersion, format="masquerade-mask/-1")
    yield said("format-delta-without-parent", corrupt, format="masquerade-delta/1")
    yield said("delta-as-mask", maskstore.MaskMismatch, format="masquerade-delta/1", parent="a" * 64)
    yield said("not-a-string", gamma=0)
    yield said("gamma-nan", gamma="NaN")
    yield said("gamma-two", gamma="2")
    yield said("gamma-true", gamma="true")
    yield said("gamma-text", gamma='"0"')
    yield said("phase", phase='"prefill"')
    yield said("persona-path", persona='"../../etc/passwd"')
    yield said("persona-reserved", persona='"base"')
    yield said("persona-unicode", persona='"\\u202eetarip"')
    yield said("persona-newline", persona='"pirate\\n"')
    yield said("opposite-number", opposite="3")
    yield said("time", created_at='"0000-99-99"')
    yield said("certificate-list", certificate="[]")
    for where, (field, value) in WRONG.items():
        yield said(f"type-{where.replace(' ', '-')}", **{field: json.dumps(value)})
    yield said("base-missing", base="{}")
    yield said("base-extra", base=json.dumps({"fingerprint": "a" * 64, "name": "x", "path": "/"}))
    yield said("base-short", base=json.dumps({"fingerprint": "abc", "name": "x"}))
    yield said("base-control", base=json.dumps({"fingerprint": "a" * 64, "name": "x\x1b[31m"}))
    yield said("digest-other", errors.DigestMismatch, digest="0" * 64)
    yield said("digest-text", digest="x")
    yield said("signature-form", signature="me")
    yield said("signature-later", signature=f"3:{'0' * 64}:{'0' * 128}")
    yield said("modules-empty", modules="{}")
    yield said("modules-list", modules="[]")
    yield said("modules-short", modules=json.dumps({OUT: [1, 2]}))
    yield said("modules-path", modules=json.dumps({"../x": [1, 1, "0" * 64]}))
    for name, sides in (
        ("zero", (0, 64)),
        ("negative", (-16, 64)),
        ("huge", (16, 1 << 40)),
        ("product", (1 << 20, 1 << 20)),
    ):
        yield Attack(f"metadata-shape-{name}", corrupt, forge.edit_json(raw, "modules", _reshape(sides)))
    yield Attack("metadata-shape-true", corrupt, forge.edit_json(raw, "modules", _reshape((16, True))))
    yield Attack("metadata-shape-other", errors.TensorShape, forge.edit_json(raw, "modules", _reshape((17, 64))))
    yield Attack("metadata-module-lost", errors.TensorSet, forge.edit_json(raw, "modules", lambda m: m.pop(OUT)))


def _reshape(sides: tuple[int, int]) -> Callable[[dict], object]:
    return lambda modules: modules.update({OUT: [*sides, modules[OUT][2]]})


def tensors(raw: bytes) -> Iterator[Attack]:
    shape, corrupt = errors.TensorShape, errors.HeaderCorrupt

    def entry(name: str, error: type[MaskError], tensor: str, **values: object) -> Attack:
        return Attack(f"tensor-{name}", error, forge.edit(raw, lambda d: d[tensor].update(values)))

    for dtype in ("F32", "I8", "BOOL", "I32", "u8", "", None, 8, ["U8"]):
        label = str(dtype).strip("[]'") or "empty"
        yield entry(f"dtype-{label}", errors.TensorOffsets if dtype == "I32" else shape, f"{DOWN}.keep", dtype=dtype)
    yield entry("shape-turned", shape, f"{DOWN}.keep", shape=[16, 24])
    yield entry("shape-flat", shape, f"{DOWN}.keep", shape=[384])
    yield entry("shape-three", corrupt, f"{DOWN}.keep", shape=[24, 4, 4])
    yield entry("shape-none", corrupt, f"{DOWN}.keep", shape=None)
    yield entry("shape-object", corrupt, f"{DOWN}.keep", shape={"0": 24})
    yield entry("shape-negative", corrupt, f"{OUT}.rows", shape=[-17])
    yield entry("shape-2-63", errors.TensorOffsets, f"{OUT}.rows", shape=[2**63])
    yield entry("shape-overflow", errors.TensorOffsets, f"{DOWN}.keep", shape=[2**32, 2**32])
    yield entry("shape-scalar", errors.TensorOffsets, f"{OUT}.rows", shape=[])
    yield entry("entry-extra", corrupt, f"{OUT}.rows", strides=[4])
    yield Attack("tensor-entry-null", corrupt, forge.edit(raw, lambda d: d.update({f"{OUT}.rows": None})))
    yield Attack("tensor-missing", errors.TensorSet, forge.edit(raw, lambda d: d.pop(f"{OUT}.cols")))
    extra = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for name in ("x", f"{OUT}.keep.keep", "__metadata__.x", f"{DOWN}.rows", ""):
        yield Attack(f"tensor-extra-{name or 'nameless'}", errors.TensorSet, forge.edit(raw, _add(name, extra)))
    yield Attack("tensor-both-sets", shape, forge.edit(raw, _add(f"{OUT}.keep", extra)))


def _add(name: str, entry: dict) -> Callable[[dict], object]:
    return lambda document: document.update({name: entry})


def offsets(raw: bytes) -> Iterator[Attack]:
    error, corrupt = errors.TensorOffsets, errors.HeaderCorrupt

    def moved(name: str, error: type[MaskError], tensor: str, change: Callable[[list], list]) -> Attack:
        def apply(document: dict) -> None:
            document[tensor]["data_offsets"] = change(document[tensor]["data_offsets"])

        return Attack(f"offset-{name}", error, forge.edit(raw, apply))

    rows, cols = f"{OUT}.rows", f"{OUT}.cols"
    yield moved("gap", error, cols, lambda span: [each + 2 for each in span])
    yield moved("overlap", error, rows, lambda span: [each - 4 for each in span])
    yield moved("same-place", error, rows, lambda span: [0, span[1] - span[0]])
    yield moved("turned", error, rows, lambda span: span[::-1])
    yield moved("longer", error, rows, lambda span: [span[0], span[1] + 4])
    yield moved("shorter", error, rows, lambda span: [span[0], span[1] - 4])
    yield moved("negative", corrupt, rows, lambda span: [-8, span[1]])
    yield moved("2-63", error, rows, lambda span: [2**63, 2**63 + span[1] - span[0]])
    yield moved("wrap", error, rows, lambda span: [2**64 + each for each in span])
    yield moved("three", corrupt, rows, lambda span: [*span, 0])
    yield moved("one", error, rows, lambda span: span[:1])
    yield moved("true", corrupt, rows, lambda span: [True, span[1]])
    yield moved("text", corrupt, rows, lambda span: [str(each) for each in span])
    yield Attack("offset-trailing-byte", error, raw + b"\x00")
    yield Attack("offset-trailing-mask", error, raw + raw)


def contents(raw: bytes) -> Iterator[Attack]:
    """Tensors that break a rule although every checksum fits."""

    def patched(name: str, error: type[MaskError], tensor: str, at: int, value: bytes) -> Attack:
        change = lambda content: content.__setitem__(slice(at, at + len(value)), value)  # noqa: E731
        return Attack(f"content-{name}", error, forge.patch(raw, tensor, change))

    order = errors.ColumnOrder
    for bit in (100, 103, 104, 127):
        value = bytes([1 << bit % 8])
        yield patched(f"pad-bit-{bit}", errors.PadBits, f"{DOWN}.keep", 16 + bit // 8, value if bit >= 104 else b"\xff")
    yield patched("rows-start", order, f"{OUT}.rows", 0, struct.pack("<i", 1))
    yield patched("rows-end", order, f"{OUT}.rows", 64, struct.pack("<i", 2**31 - 1))
    yield patched("rows-negative", order, f"{OUT}.rows", 16, struct.pack("<i", -(2**31)))
    yield patched("rows-beyond", order, f"{OUT}.rows", 16, struct.pack("<i", 10**6))
    yield patched("cols-out-of-range", order, f"{OUT}.cols", 0, struct.pack("<H", 64))
    yield patched("cols-largest", order, f"{OUT}.cols", 0, struct.pack("<H", 65535))
    busy = np.zeros((16, 64), bool)
    busy[3, [5, 9]] = True
    two = _written(world.write_rows, maskstore.Mask(world.BASE, {OUT: maskstore.encode(busy)}, world.info()))
    yield Attack("content-cols-unsorted", order, forge.patch(two, f"{OUT}.cols", lambda c: c.__setitem__(0, 10)))
    yield Attack("content-cols-repeated", order, forge.patch(two, f"{OUT}.cols", lambda c: c.__setitem__(0, 9)))


def gaps(raw: bytes) -> Iterator[Attack]:
    """Gaps that do not decode, or decode to more than a file may hold."""
    error, corrupt, name = errors.GapsCorrupt, errors.HeaderCorrupt, f"{OUT}.gaps"
    document, data = forge.split(raw)
    begin, end = document[name]["data_offsets"]
    sound = data[begin:end]

    def swapped(content: bytes) -> bytes:
        changed = json.loads(json.dumps(document))
        changed[name].update(shape=[len(content)], data_offsets=[begin, begin + len(content)])
        for other, entry in changed.items():
            if "data_offsets" in entry and other != name and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at + len(content) - len(sound) for at in entry["data_offsets"]]
        return forge.join(changed, data[:begin] + content + data[end:])

    def counted(count: object) -> bytes:
        return forge.edit_json(raw, "modules", lambda modules: modules[OUT].__setitem__(3, count))

    for label, content in (
        ("none", b""),
        ("cut", sound[:-1]),
        ("long", sound + bytes(100)),
        ("zeros", bytes(len(sound))),
    ):
        yield Attack(f"gaps-{label}", error, swapped(content))
    yield Attack("gaps-ones", error, swapped(b"\xff" * len(sound)))
    yield Attack("gaps-flipped", error, _flip(raw, len(raw) - len(data) + end - 1))
    for count in (-1, 2**20 + 1, 2**63, True, None, "text", []):
        yield Attack(f"gaps-count-{str(count).strip('[]') or 'list'}", corrupt, counted(count))
    for count in (0, 1, 20):
        yield Attack(f"gaps-count-{count}", error, counted(count))
    lost = forge.edit_json(raw, "modules", lambda modules: modules[OUT].pop())
    yield Attack("gaps-count-lost", corrupt, lost)
    first = forge.edit(raw, lambda each: each["__metadata__"].update(format="masquerade-mask/1"))
    yield Attack("gaps-in-version-1", errors.TensorSet, first)
    extra = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    yield Attack("gaps-beside-keep", errors.TensorSet, forge.edit(raw, _add(f"{DOWN}.gaps", extra)))
    wide = forge.edit(raw, lambda each: each[name].update(dtype="U16", shape=[len(sound) // 2]))
    yield Attack("gaps-wide", errors.TensorShape, wide)
    yield Attack("gaps-of-many-rows", corrupt, _many_rows(document))


def _many_rows(document: dict) -> bytes:
    """8,192 empty modules whose row offsets would take 32 GiB."""
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    names = [f"m{at}" for at in range(8192)]
    modules = json.dumps({name: [1 << 20, 1, "0" * 64, 0] for name in names})
    changed = {"__metadata__": document["__metadata__"] | {"modules": modules}}
    return forge.join(changed | {f"{name}.gaps": empty for name in names}, b"")


def other_files(raw: bytes) -> Iterator[Attack]:
    """Files of other kinds, and files that are two things at once."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("payload.txt", "x" * 100)
    packed = archive.getvalue()
    yield Attack("other-zip", errors.NotAMask, packed)
    yield Attack("other-zip-after-mask", errors.TensorOffsets, raw + packed)
    yield Attack("other-zip-before-mask", errors.NotAMask, packed + raw)
    yield Attack("other-pickle", errors.NotAMask, pickle.dumps({"weights": list(range(100))}))
    yield Attack("other-text", errors.NotAMask, b"# a readme, long enough to look like a header\n" * 10)
    yield Attack("other-zeros", errors.NotAMask, bytes(100_000))
    yield Attack("other-png", errors.NotAMask, b"\x89PNG\r\n\x1a\n" + bytes(100))
    model = {"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}
    text = json.dumps(model).encode()
    yield Attack("other-model", errors.NotAMask, struct.pack("<Q", len(text)) + text + bytes(4))
    yield Attack("other-empty-model", errors.NotAMask, struct.pack("<Q", 2) + b"{}")


def not_files(raw: bytes) -> Iterator[Attack]:
    def link(path: Path) -> None:
        target = path.with_name("target-of-link")
        target.write_bytes(raw)
        path.symlink_to(target)

    error = errors.NotAMask
    yield Attack("place-link", error, plant=link)
    yield Attack("place-link-to-itself", error, plant=lambda path: path.symlink_to(path))
    yield Attack("place-link-to-device", error, plant=lambda path: path.symlink_to("/dev/zero"))
    yield Attack("place-broken-link", error, plant=lambda path: path.symlink_to("nowhere"))
    yield Attack("place-pipe", error, plant=lambda path: os.mkfifo(path))
    yield Attack("place-folder", error, plant=lambda path: path.mkdir())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for attack in attacks():
        print(f"{attack.write(folder).name}: {attack.error.__name__}")
