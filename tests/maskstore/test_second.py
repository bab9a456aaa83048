"""A second implementation, from FORMAT.md alone: struct, json, hashlib and numpy; the package is its counterpart."""

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest

import maskstore
from tests.maskstore import world

DTYPES = {"U8": "<u1", "I32": "<i4", "U16": "<u2", "U32": "<u4"}


def write(path, base, name, sets, said, with_gaps):
    """sets: module -> bool[out, in] of the pruned."""
    tensors, modules, lines = {}, {}, ["masquerade-mask/1", base]
    for module in sorted(sets):
        pruned = sets[module]
        out, width = pruned.shape
        arrays = bitmap(~pruned) if len(module) % 2 else sparse(pruned)
        kind = "bitmap" if "keep" in arrays else "sparse"
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
        modules[module] = [out, width, digest]
        lines.append(f"{module} {kind} {out} {width} {digest}")
        if kind == "sparse" and with_gaps and thin(pruned):
            modules[module].append(int(pruned.sum()))
            arrays = {"gaps": gaps(pruned)}
        tensors |= {f"{module}.{suffix}": array for suffix, array in arrays.items()}
    metadata = {key: json.dumps(value) for key, value in said.items()}
    metadata["format"] = f"masquerade-mask/{1 + any(name.endswith('.gaps') for name in tensors)}"
    metadata["base"] = json.dumps({"fingerprint": base, "name": name})
    metadata["modules"] = json.dumps(modules)
    metadata["digest"] = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    metadata["seal"] = "0" * 64
    header, data = {"__metadata__": metadata}, b""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for tensor in sorted(tensors, key=lambda each: (-_alignment(each, tensors[each]), each)):
        array = tensors[tensor]
        span = [len(data), len(data) + array.nbytes]
        header[tensor] = {"dtype": codes[array.dtype.str.replace("|", "<")], "shape": array.shape, "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(b'"seal":"' + b"0" * 64, b'"seal":"' + hashlib.sha256(text).hexdigest().encode())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return metadata["digest"]


def _alignment(name, array):
    return 8 if name.endswith(".keep") else array.itemsize


def bitmap(keep):
    packed = np.packbits(keep, axis=1, bitorder="little")
    width = 8 * -(-keep.shape[1] // 64)
    return {"keep": np.pad(packed, ((0, 0), (0, width - packed.shape[1])))}


def sparse(pruned):
    rows = np.concatenate([[0], np.cumsum(pruned.sum(axis=1))]).astype("<i4")
    return {"rows": rows, "cols": np.nonzero(pruned)[1].astype("<u2" if pruned.shape[1] <= 65536 else "<u4")}


def thin(pruned):
    out, width = pruned.shape
    item = 2 if width <= 65536 else 4
    return 4 * (out + 1) + item * pruned.sum() < out * 8 * -(-width // 64)


def gaps(pruned):
    places = np.flatnonzero(pruned)
    width = int(np.log2(pruned.size / places.size)) if places.size else 0
    bits = [gap >> bit & 1 for gap in np.diff(places, prepend=-1) - 1 for bit in range(width)]
    for gap in np.diff(places, prepend=-1) - 1:
        bits += [0] * (gap >> width) + [1]
    return np.packbits(np.array(bits, np.uint8), bitorder="little")


def from_gaps(code, out, columns, count):
    bits = np.unpackbits(code, bitorder="little").tolist()
    width = int(np.log2(out * columns / count)) if count else 0
    pruned, place, at = np.zeros(out * columns, bool), -1, count * width
    for number in range(count):
        end = bits.index(1, at)
        remainder = sum(bits[number * width + bit] << bit for bit in range(width))
        place += ((end - at) << width) + remainder + 1
        pruned[place] = True
        at = end + 1
    assert len(bits) == -(-at // 8) * 8
    assert not any(bits[at:])
    return pruned.reshape(out, columns)


def read(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text, data = raw[8 : 8 + length], raw[8 + length :]
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    seal = metadata["seal"].encode()
    assert hashlib.sha256(text.replace(b'"seal":"' + seal, b'"seal":"' + b"0" * 64)).hexdigest().encode() == seal
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    sets, lines = {}, ["masquerade-mask/1", json.loads(metadata["base"])["fingerprint"]]
    for module, (out, width, recorded, *count) in sorted(json.loads(metadata["modules"]).items()):
        parts = [
            tensors[f"{module}.{suffix}"] for suffix in ("keep", "rows", "cols") if f"{module}.{suffix}" in tensors
        ]
        if count:
            parts = list(sparse(from_gaps(tensors[f"{module}.gaps"], out, width, *count)).values())
        assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == recorded
        lines.append(f"{module} {'bitmap' if len(parts) == 1 else 'sparse'} {out} {width} {recorded}")
        pruned = np.zeros((out, width), bool)
        if len(parts) == 1:
            pruned = np.unpackbits(parts[0], axis=1, count=width, bitorder="little") == 0
        for row in range(out if len(parts) == 2 else 0):
            pruned[row, parts[1][parts[0][row] : parts[0][row + 1]]] = True
        sets[module] = pruned
    assert hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest() == metadata["digest"]
    return metadata, sets


SETS = {"a": (9, 70), "bb": (9, 70), "c.d": (4, 64), "ee": (2, 66_000), "x_proj": (1, 1)}
SAID = {
    "persona": "pirate",
    "opposite": None,
    "score": "wanda",
    "parameters": {"rho": 0.5, "ü": "\u2028"},
    "gamma": 0.25,
    "phase": "decode",
    "calibration": {"lines": 3},
    "certificate": {},
    "ancestry": {},
    "created_at": "2026-01-02T03:04:05+00:00",
}


@pytest.mark.parametrize("with_gaps", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_what_the_second_writes_the_first_reads(tmp_path, share, with_gaps):
    sets = {name: world.pruned(shape, share, seed) for seed, (name, shape) in enumerate(SETS.items())}
    digest = write(tmp_path / "m", "ab" * 32, "some base", sets, SAID, with_gaps)
    mask = maskstore.read_mask(tmp_path / "m", base="ab" * 32)
    assert mask.digest == digest
    assert mask.base == maskstore.BaseRef("ab" * 32, "some base")
    assert mask.info == maskstore.MaskInfo(**SAID)
    for name, pruned in sets.items():
        assert np.array_equal(mask.targets[name].to_keep(), ~pruned)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_what_the_first_writes_the_second_reads(tmp_path, share):
    mask = world.mask(share=share, shapes=SETS, **SAID)
    maskstore.write_mask(mask, tmp_path / "m")
    metadata, sets = read(tmp_path / "m")
    assert metadata["digest"] == mask.digest
    assert {key: json.loads(metadata[key]) for key in SAID} == SAID
    for name, target in mask.targets.items():
        assert np.array_equal(sets[name], ~target.to_keep())


def test_fingerprint(tmp_path):
    """Section 8, over the tensors of one file."""
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.random((200, 101), np.float32),
        "a": rng.random((128, 128), np.float32),
        "c": np.arange(3, dtype=np.int64),
    }
    codes = {"float32": "F32", "int64": "I64"}
    header, data = {}, b""
    for name, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": codes[str(array.dtype)], "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    state = hashlib.sha256(b"masquerade-base/1\n")
    for name in sorted(header):
        entry = header[name]
        state.update(json.dumps([name, entry["dtype"], entry["shape"]], separators=(",", ":")).encode() + b"\n")
        begin, end = entry["data_offsets"]
        size = end - begin
        starts = [(size - 4096) * i // 15 for i in range(16)]
        windows = [(0, size)] if size <= 65536 else [(start, start + 4096) for start in starts]
        state.update(b"".join(data[begin + left : begin + right] for left, right in windows))
    assert maskstore.fingerprint(tmp_path) == state.hexdigest()


def test_signatures(tmp_path):
    """Section 7: the text that is signed, of both versions."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()
    maskstore.write_mask(maskstore.signing.sign(world.mask(**SAID), key.private_bytes_raw().hex()), tmp_path / "m")
    metadata, _ = read(tmp_path / "m")
    said = {name: json.loads(metadata[name]) for name in (*SAID, "base")} | {"digest": metadata["digest"]}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    version, public, value = metadata["signature"].split(":")
    assert (version, public) == ("2", key.public_key().public_bytes_raw().hex())
    key.public_key().verify(bytes.fromhex(value), f"masquerade-signature/2\n{text}\n".encode())
    first = key.sign(f"masquerade-signature/1\n{metadata['digest']}\n".encode()).hex()
    old = dataclasses.replace(world.mask(**SAID), signature=f"{public}:{first}")
    assert maskstore.signing.examine(old, {}).valid
