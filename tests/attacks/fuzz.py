"""Coverage-guided fuzzing of the reader. `python -m tests.attacks.fuzz -max_total_time=600 [FOLDER]` (needs `atheris`).

The first byte chooses how deep the input reaches: raw bytes, a header that is sealed for it, a metadata value or tensor
bytes whose checksums are made to fit, a stream of flips. Whatever leaves the error tree is a crash.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["maskstore"]):
    from maskstore import DeltaReader, MaskError, read_mask, write_delta

from tests.attacks.corpus import OUT, coded, sound
from tests.maskstore import forge, world
from tests.maskstore.test_delta import relative

RAW = sound()
DOCUMENT, DATA = forge.split(RAW)
CODED, CODED_DATA = forge.split(coded())
TENSORS = [name for name in DOCUMENT if name != "__metadata__"]
KEYS = sorted(DOCUMENT["__metadata__"])
WORDS = (
    *(
        "U8",
        "I32",
        "U16",
        "U32",
        "dtype",
        "shape",
        "data_offsets",
        "keep",
        "rows",
        "cols",
        "gaps",
        "flips_bitmap",
        "NaN",
    ),
    *(
        "true",
        "null",
        "9223372036854775808",
        "1e999",
        "-1",
        "[[",
        "{}",
        "all",
        "decode",
        "\\\\u202e",
        "masquerade-delta/1",
        "masquerade-mask/2",
    ),
)
PARENT = world.mask(share=0.5, shapes={"a": (24, 100)})


def delta() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_delta(relative(PARENT, 1), PARENT, Path(folder) / "d")
        return (Path(folder) / "d").read_bytes()


DELTA, _ = forge.split(delta())


def as_bytes(data: bytes) -> bytes:
    return data


def as_header(data: bytes) -> bytes:
    """The input is the header's text; a seal in it is made to fit."""
    text = data.decode("latin-1").encode("ascii", "ignore").decode()
    return forge.seal(text) + DATA


def as_value(data: bytes) -> bytes:
    """The input is one metadata value of a sound file."""
    key, text = KEYS[data[0] % len(KEYS)], data[1:].decode("latin-1")
    return forge.edit(RAW, lambda document: document["__metadata__"].update({key: text}))


def as_entry(data: bytes) -> bytes:
    """The input is the JSON of one tensor's entry."""
    try:
        entry = json.loads(data[1:].decode("latin-1"))
    except (ValueError, RecursionError):
        return data
    return forge.edit(RAW, lambda document: document.update({TENSORS[data[0] % len(TENSORS)]: entry}))


def as_tensor(data: bytes) -> bytes:
    """The input overwrites a tensor; every digest fits."""
    tensor = TENSORS[data[0] % len(TENSORS)]

    def change(content: bytearray) -> None:
        content[: len(data) - 1] = data[1 : 1 + len(content)]

    return forge.patch(RAW, tensor, change)


def as_flips(data: bytes) -> bytes:
    """The input is the stream of a delta."""
    document = json.loads(json.dumps(DELTA))
    document["a.flips_bitmap"].update(shape=[len(data)], data_offsets=[0, len(data)])
    return forge.join(document, data)


def as_gaps(data: bytes) -> bytes:
    """The input is a count and the gaps of a module, the last of its file."""
    document = json.loads(json.dumps(CODED))
    begin, _ = document[f"{OUT}.gaps"]["data_offsets"]
    modules = json.loads(document["__metadata__"]["modules"])
    modules[OUT][3] = data[0]
    document["__metadata__"]["modules"] = json.dumps(modules)
    document[f"{OUT}.gaps"].update(shape=[len(data) - 1], data_offsets=[begin, begin + len(data) - 1])
    for name, entry in document.items():
        if name.endswith(".gaps") and name != f"{OUT}.gaps":
            entry["data_offsets"] = [begin + len(data) - 1] * 2
    content = CODED_DATA[:begin] + data[1:]
    forge.rehash(document, content)
    return forge.join(document, content)


FORMS = (as_bytes, as_header, as_value, as_entry, as_tensor, as_flips, as_gaps)


def attempt(path: Path, data: bytes) -> None:
    if len(data) < 2:
        return
    path.write_bytes(FORMS[data[0] % len(FORMS)](data[1:] or b"\0"))
    try:
        read_mask(path)
    except MaskError as error:
        str(error)
    try:
        with DeltaReader(path, lambda _: PARENT) as reader:
            reader.mask()
    except MaskError as error:
        str(error)


def seeds(folder: Path) -> None:
    """One input of every form that is accepted, for the fuzzer to start from."""
    header = RAW[8 : 8 + struct.unpack("<Q", RAW[:8])[0]].replace(
        DOCUMENT["__metadata__"]["seal"].encode(), forge.BLANK.encode()
    )
    entry, gaps = json.dumps(DOCUMENT[TENSORS[0]]).encode(), CODED[f"{OUT}.gaps"]["data_offsets"][0]
    samples = [RAW, header, b"", b"\0" + entry, b"\0\0", b"\x05\x10\xff\x20", b""]
    samples[6] = bytes([json.loads(CODED["__metadata__"]["modules"])[OUT][3]]) + CODED_DATA[gaps:]
    samples[2] = bytes([KEYS.index("modules")]) + DOCUMENT["__metadata__"]["modules"].encode()
    for form, sample in enumerate(samples):
        (folder / f"form-{form}").write_bytes(bytes([form]) + sample)


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        seeds(inputs)
        words = Path(folder) / "words"
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        path = Path(folder) / "m"
        atheris.Setup([*sys.argv, f"-dict={words}", str(inputs)], lambda data: attempt(path, bytes(data)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
