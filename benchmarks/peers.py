"""Tokens per CPU-second beside other engines, with 1, 4 and 16 streams of SmolLM2 on one core.

`python -m benchmarks.peers --json [--quick] [--peers transformers peft llama.cpp] [--kind Q4_K] [--streams 1 4 16]`.
The model is `smollm2`, a GGUF file of type Q4_1; with `--kind`, a random Llama of 185 million weights in that type,
whose rows are whole blocks of 256 (embeddings in Q6_K, or in Q8_0 beside a type without super-blocks), as llama.cpp's
own files of larger models have them. Masquerade runs it as it is served, with weights in the file's blocks where the
processor allows that, in bf16, and with inputs of 8 bits, as llama.cpp has them (`--quantization a8`). `generate` of
transformers (a static batch) and PEFT run it in bf16. llama.cpp runs the file itself, and the same weights as a GGUF
file in BF16.
Prompts have 40 to 80 tokens and are equal for all. Decoding is greedy and has no end token, so that the work is equal;
it is timed from the first token of every answer to the last. Sides take turns within each round: rates are medians,
ratios are medians of the ratios of each round. Times are CPU time of the whole process that computes. Masks have 55 000
weights of o_proj and down_proj, adapters are of rank 16 on the same Linears; both are random.

A peer that is not installed is left out with a line on stderr. llama.cpp comes from npm, its binary included:

    npm install --prefix .peers --ignore-scripts node-llama-cpp@3.22.1

Its batches cannot mix adapters: they belong to a context. Eight adapters are eight contexts here, one after the other.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import StoppingCriteria
from transformers.utils import logging

from benchmarks._report import Figure, arguments, follow, report
from benchmarks._world import load_smollm2
from benchmarks.engine import GREEDY, PROMPTS_FIRST, make_prompts, run_generate
from benchmarks.real import GAMMA, make_mask
from masquerade.engine import Engine, Request
from masquerade.kernels.quantised import FORMS
from masquerade.model import AppliedMask, Base, MaskManager, load
from masquerade.model.quantized import A8
from tests.model.gguf_blocks import quantise
from tests.model.ggufs import copy_metadata

OURS, PLAIN, ROUNDED = "Masquerade", "Masquerade, bf16", "Masquerade, a8"
PEERS = "transformers", "peft", "llama.cpp"
STREAMS = (1, 4, 16)
MIXED = (16,)  # streams of the sides with eight personas or adapters
ADAPTERS = 8
REACH_ALONE, REACH_MIXED = ">= 0.9", ">= 3"  # of one stream, and of personas beside as many adapters
RANK = 16
NODE = "node-llama-cpp@3.22.1"
SHAPE = {  # of a random model
    "block_count": 12,
    "embedding_length": 1024,
    "feed_forward_length": 2816,
    "attention.head_count": 16,
    "attention.head_count_kv": 4,
    "rope.dimension_count": 64,
}
FOLDER = Path(__file__).parents[1] / ".peers"

# A loop over jobs, a line of JSON each. A step waits for one token of every stream, so batches are full.
SCRIPT = """
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, maxThreads: 1, build: "never", logLevel: "error"});
const models = {};
console.log("ready");
const since = (start) => { const {user, system} = process.cpuUsage(start); return (user + system) / 1e6; };
for await (const line of createInterface({input: process.stdin})) {
  const {path, adapters, prompts, tokens} = JSON.parse(line);
  const model = models[path] ??= await llama.loadModel({modelPath: path, gpuLayers: 0});
  const settings = {
    sequences: Math.ceil(prompts.length / Math.max(adapters.length, 1)), threads: 1,
    contextSize: Math.max(...prompts.map((prompt) => prompt.length)) + tokens + 1,
  };
  const contexts = [];
  for (const filePath of adapters)
    contexts.push(await model.createContext({...settings, lora: {adapters: [{filePath}]}}));
  if (!contexts.length) contexts.push(await model.createContext(settings));
  const streams = prompts.map((prompt, place) => contexts[place % contexts.length].getSequence()
    .evaluate(prompt, {temperature: 0, yieldEogToken: true}));
  const step = async () => (await Promise.all(streams.map((stream) => stream.next()))).filter(({done}) => !done).length;
  const started = process.cpuUsage();
  await step();
  const prompted = since(started), first = process.cpuUsage();
  let count = 0;
  for (let i = 1; i < tokens; i++) count += await step();
  const decoding = since(first);
  for (const context of contexts) await context.dispose();
  console.log(JSON.stringify({prompts: prompted, decoding, tokens: count}));
}
process.exit(0);
"""


class NotInstalled(Exception):
    """A peer that is left out; the message says what installs it."""


@dataclass(frozen=True)
class Spent:
    """CPU seconds until every answer had a token, of decoding since then, and the tokens of the latter."""

    prompts: float
    decoding: float
    tokens: int


LoadBase = Callable[..., Base]
Run = Callable[[list[list[int]], int], Spent]


@dataclass(frozen=True)
class Side:
    """An engine with a number of personas or adapters, and Masquerade's sides that it is compared with."""

    name: str
    run: Run
    beside: tuple[str, ...] = ()
    streams: tuple[int, ...] = STREAMS


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    rounds: int
    new: int  # tokens of an answer


FULL = Scale(5, 64)
QUICK = Scale(2, 32)


def main() -> None:
    parser = arguments(__doc__, "fewer rounds and tokens; within three CPU minutes where there are bf16 instructions")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="what is not installed is left out")
    parser.add_argument("--kind", choices=FORMS, help="type of a random model's weights; by default SmolLM2's Q4_1")
    parser.add_argument("--streams", nargs="+", type=int, choices=STREAMS, default=STREAMS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides = find_sides(Path(folder), options.peers, options.kind)
        scale = QUICK if options.quick else FULL
        figures = follow("peers", measure_sides(sides, options.streams, scale))  # a run takes half an hour
    report("peers", figures, options.json)


def find_sides(folder: Path, peers: Sequence[str], kind: str | None) -> list[Side]:
    """Masquerade and the peers that are installed; the others are named on stderr."""
    load_base: LoadBase = load_smollm2
    if kind:
        path = folder / f"{kind}.gguf"
        write_random(load_smollm2().path, path, gguf.GGMLQuantizationType[kind])
        load_base = partial(load, str(path), device="cpu")
    base = load_base(keep_blocks=True)
    sides = [*make_masquerade(OURS, base), *make_masquerade(ROUNDED, load_base(quantization=A8))]
    plain = load_base()
    MaskManager.attach(plain.model)
    sides.append(Side(PLAIN, partial(run_masquerade, plain, [None])))
    make: dict[str, Callable[[], Iterator[Side]]] = {
        "transformers": partial(make_transformers, load_base),
        "peft": partial(make_peft, load_base),
        "llama.cpp": partial(make_llama_cpp, base, kind or "Q4_1", folder),
    }
    for peer in peers:
        try:
            sides += make[peer]()
        except NotInstalled as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
    print("left out: vLLM; its build for CPUs pins a torch of its own, so it cannot run here", file=sys.stderr)
    return sides


def measure_sides(sides: Sequence[Side], streams: Sequence[int], scale: Scale) -> Iterator[Figure]:
    """Rates of decoding and of prompts, and ratios of decoding."""
    for count in streams:
        prompts = make_prompts(count, (40, 80))
        present = [side for side in sides if count in side.streams]
        spent: dict[str, list[Spent]] = {side.name: [] for side in present}
        for _ in range(scale.rounds):
            for side in present:
                spent[side.name].append(side.run(prompts, scale.new))
        rates = {name: np.array([run.tokens / run.decoding for run in runs]) for name, runs in spent.items()}
        for side in present:
            label = f"{side.name}, {count} stream{'s' if count > 1 else ''}"
            seconds = float(np.median([run.prompts for run in spent[side.name]]))
            yield Figure(label, float(np.median(rates[side.name])), "tokens/CPU-s")
            yield Figure(f"{label}, prompts", sum(map(len, prompts)) / seconds, "tokens/CPU-s")
            for beside in side.beside:
                ratio = float(np.median(rates[beside] / rates[side.name]))
                reach = REACH_ALONE if count == 1 else REACH_MIXED if side.streams == MIXED else None
                yield Figure(f"{beside} / {label}", ratio, "x", reach)


def make_masquerade(name: str, base: Base) -> Iterator[Side]:
    """The base alone, one persona and eight."""
    manager = MaskManager.attach(base.model)
    masks: list[AppliedMask | None] = [
        AppliedMask(manager.fit(make_mask(base, seed)), GAMMA) for seed in range(ADAPTERS)
    ]
    yield Side(name, partial(run_masquerade, base, [None]))
    yield Side(f"{name}, 1 persona", partial(run_masquerade, base, masks[:1]))
    yield Side(f"{name}, {ADAPTERS} personas", partial(run_masquerade, base, masks), streams=MIXED)


def run_masquerade(base: Base, masks: Sequence[AppliedMask | None], prompts: list[list[int]], new: int) -> Spent:
    engine = Engine(base, PROMPTS_FIRST)
    requests = [
        Request(prompt, new, lambda _: None, masks[place % len(masks)], sampling=GREEDY)
        for place, prompt in enumerate(prompts)
    ]
    engine.submit(*requests)
    started = time.process_time()
    while any(not request.num_output_tokens for request in requests):
        engine.step()
    first, early = time.process_time(), sum(request.num_output_tokens for request in requests)
    while any(request.num_output_tokens < new for request in requests):
        engine.step()
    ended, tokens = time.process_time(), sum(request.num_output_tokens for request in requests)
    engine.stop()
    return Spent(first - started, ended - first, tokens - early)


def make_transformers(load_base: LoadBase) -> Iterator[Side]:
    """`generate` on a copy of the model whose Linears are torch's."""
    yield Side("transformers", partial(run_transformers, load_base(), 0), (PLAIN,))


def make_peft(load_base: LoadBase) -> Iterator[Side]:
    """`generate` with one adapter, and with eight in a batch."""
    if importlib.util.find_spec("peft") is None:
        raise NotInstalled("PEFT; `pip install peft` installs it")
    from peft import LoraConfig, get_peft_model

    base = load_base()
    config = LoraConfig(r=RANK, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    # The adapters stay in bf16, as the model: by default PEFT computes them in fp32.
    adapted = get_peft_model(base.model, config, "0", autocast_adapter_dtype=False)
    for place in range(1, ADAPTERS):
        adapted.add_adapter(str(place), config, autocast_adapter_dtype=False)
    base = replace(base, model=adapted.eval())
    yield Side("PEFT, 1 LoRA", partial(run_transformers, base, 1), (f"{OURS}, 1 persona",))
    mixed = partial(run_transformers, base, ADAPTERS)
    yield Side(f"PEFT, {ADAPTERS} LoRAs", mixed, (f"{OURS}, {ADAPTERS} personas",), MIXED)


class _FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when it is asked for the first time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self.seconds = self.seconds or time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run_transformers(base: Base, adapters: int, prompts: list[list[int]], new: int) -> Spent:
    """With more than one adapter, each prompt names its own."""
    first = _FirstToken()
    names = {"adapter_names": [str(place % adapters) for place in range(len(prompts))]} if adapters > 1 else {}
    started = time.process_time()
    run_generate(base, prompts, new, stopping_criteria=[first], **names)
    return Spent(first.seconds - started, time.process_time() - first.seconds, len(prompts) * (new - 1))


def make_llama_cpp(base: Base, kind: str, folder: Path) -> Iterator[Side]:
    """The file, the same with one adapter and with eight, and its weights in BF16."""
    if not shutil.which("node") or not (FOLDER / "node_modules/node-llama-cpp").exists():
        raise NotInstalled(f"llama.cpp; node and `npm install --prefix .peers --ignore-scripts {NODE}` install it")
    script = FOLDER / "peers.mjs"  # node looks for packages beside a script
    script.write_text(SCRIPT)
    child = subprocess.Popen(
        ["node", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # ends with this process, because its input does
    assert child.stdout is not None
    if not child.stdout.readline():
        raise NotInstalled(f"llama.cpp; the binary of {NODE} does not run here, as node says above")
    reader = gguf.GGUFReader(base.path)
    adapters = [folder / f"{place}.gguf" for place in range(ADAPTERS)]
    for place, path in enumerate(adapters):
        write_adapter(reader, path, place)
    write_bf16(reader, folder / "bf16.gguf")
    run = partial(run_llama_cpp, child)
    yield Side(f"llama.cpp, {kind}", partial(run, base.path, []), (OURS, ROUNDED))
    yield Side("llama.cpp, BF16", partial(run, folder / "bf16.gguf", []), (PLAIN,))
    one = tuple(f"{ours}, 1 persona" for ours in (OURS, ROUNDED))
    yield Side(f"llama.cpp, {kind}, 1 LoRA", partial(run, base.path, adapters[:1]), one)
    many = tuple(f"{ours}, {ADAPTERS} personas" for ours in (OURS, ROUNDED))
    yield Side(f"llama.cpp, {kind}, {ADAPTERS} LoRAs", partial(run, base.path, adapters), many, MIXED)


def write_adapter(reader: gguf.GGUFReader, path: Path, seed: int) -> None:
    """A random LoRA for o_proj and down_proj of a GGUF file."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, RANK)
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_output.weight", "ffn_down.weight")):
            inputs, outputs = map(int, tensor.shape)
            for part, shape in (("a", (RANK, inputs)), ("b", (outputs, RANK))):
                values = rng.standard_normal(shape, dtype=np.float32) * 0.01
                writer.add_tensor(f"{tensor.name}.lora_{part}", values.astype(np.float16))
    _write(writer)


def write_random(like: Path, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A random Llama with the vocabulary of a GGUF file and matrices of a type."""
    reader, writer, rng = gguf.GGUFReader(like), gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    copy_metadata(reader, writer)
    for key, value in SHAPE.items():
        writer.add_uint32(f"llama.{key}", value)
    width, hidden = SHAPE["embedding_length"], SHAPE["feed_forward_length"]
    keys = width // SHAPE["attention.head_count"] * SHAPE["attention.head_count_kv"]
    words = next(tensor.data.shape[0] for tensor in reader.tensors if tensor.name == "token_embd.weight")
    outer = gguf.GGMLQuantizationType.Q6_K if kind.name.endswith("_K") else gguf.GGMLQuantizationType.Q8_0
    matrices = {
        "attn_q": (width, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, width),
    }
    matrices |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    tensors = [("token_embd.weight", (words, width), outer)]
    for layer in range(SHAPE["block_count"]):
        tensors += [(f"blk.{layer}.{name}.weight", shape, kind) for name, shape in matrices.items()]
    for name, shape, form in tensors:
        values = rng.standard_normal(shape, dtype=np.float32) * 0.05
        writer.add_tensor(name, quantise(values, form), raw_dtype=form)
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(SHAPE["block_count"]) for name in ("attn", "ffn")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, np.float32))
    _write(writer)


def write_bf16(reader: gguf.GGUFReader, path: Path) -> None:
    """The model of a GGUF file with its matrices in BF16."""
    writer = gguf.GGUFWriter(path, "llama")
    copy_metadata(reader, writer)
    dtype = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, dtype), raw_dtype=dtype)
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(
    child: subprocess.Popen[str], path: Path, adapters: Sequence[Path], prompts: list[list[int]], new: int
) -> Spent:
    assert child.stdin is not None
    assert child.stdout is not None
    job = {"path": str(path), "adapters": [*map(str, adapters[: len(prompts)])], "prompts": prompts, "tokens": new}
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    return Spent(**json.loads(child.stdout.readline()))


if __name__ == "__main__":
    main()
