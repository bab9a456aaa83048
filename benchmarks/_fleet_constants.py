"""Every constant of the fleet's simulation, with its source, and what follows from them: machines and ways to serve."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks._fleet import Machine, Way

RESULTS = "benchmarks/RESULTS.md"


@dataclass(frozen=True)
class Constant:
    """A number; `kind` says whether we measured or computed it, somebody published it, or it is assumed."""

    value: float
    unit: str
    kind: str
    source: str


CONSTANTS = {
    # the load
    "personas": Constant(10_000, "personas", "assumed", "the question"),
    "alpha": Constant(1.0, "", "assumed", "Zipf's exponent of the personas' popularity; varied below"),
    "user tokens": Constant(
        230, "tokens", "published", "vllm-project/vllm PR 18566: 229,711 prompt tokens of 1,000 ShareGPT requests"
    ),
    "answer tokens": Constant(
        203, "tokens", "published", "the same run: 203,068 tokens; exponential lengths are assumed"
    ),
    "system tokens": Constant(600, "tokens", "assumed", "a character card as a system prompt; varied below"),
    "load": Constant(0.5, "of capacity", "assumed", "requests in the tables of latency / capacity of the bare base"),
    "bound": Constant(2.0, "s", "assumed", "99th percentile to the first token, within which capacity is searched"),
    # an 8B model on one GPU
    "gpu weights": Constant(16_059_990_016, "bytes", "computed", "docs/operations.md, 8B in bf16"),
    "gpu bandwidth": Constant(
        3.35e12, "bytes/s", "published", "NVIDIA's H100 SXM, as listed at glennklockwood.com/garden/processors/h100"
    ),
    "gpu peak": Constant(989e12, "FLOP/s", "published", "the same, bf16 without sparsity"),
    "gpu utilisation": Constant(0.5, "of the peak", "assumed", "in products of prompts and batches; varied below"),
    "gpu step": Constant(
        6.48e-3,
        "s",
        "published",
        "InferenceBench (yobitelcomm.github.io/bench, concurrency sweep, 2026-05-16): time per output token of one "
        "stream, Llama-3.1-8B fp16, vLLM 0.21.0, one H100",
    ),
    "gpu position": Constant(131_072, "bytes", "computed", "docs/operations.md: keys and values of a position"),
    "gpu rows": Constant(32, "requests", "assumed", "our --max-running, for all ways"),
    "gpu chunk": Constant(2048, "tokens", "assumed", "prompt tokens of a step, for all ways"),
    "gpu budget": Constant(40e9, "bytes", "assumed", "half of 80 GB for personas, for all ways; varied below"),
    "gpu mask": Constant(
        89_257_088, "bytes", "computed", "docs/operations.md: a list of 0.3 % of all Linears, on a GPU"
    ),
    "gpu mask file": Constant(47_381_952, "bytes", "computed", "docs/operations.md: the same on disk"),
    "gpu mask step": Constant(
        4 * 0.29 * 2.39e-3,
        "s",
        "measured",
        f"{RESULTS}, CUDA devices: 0.29 of 2.39 ms for 8 of 32 layers, H200; four times that is assumed",
    ),
    "gpu mask each": Constant(
        4 * 0.02 * 2.39e-3 / 31, "s", "measured", "the same: 1.31 x with 32 personas, 1.29 x with one"
    ),
    "gpu mask load": Constant(
        4 * 32e-3, "s", "measured", "the same: 32 ms from host memory for 8 layers; four times that is assumed"
    ),
    "disk": Constant(
        1.42e9, "bytes/s", "measured", f"{RESULTS}, Residency: reading a file from disk, a shared machine"
    ),
    "verified": Constant(0.83, "of the disk", "measured", "the same: a cold load, verified / reading"),
    "gpu lora": Constant(
        2 * 16 * 32 * 81_920,
        "bytes",
        "computed",
        "rank 16 of all Linears in bf16: 2 x 16 x 32 layers x 81,920 features",
    ),
    "gpu lora throughput": Constant(
        0.916,
        "of the base's",
        "published",
        "vllm-project/vllm PR 15655: -8.4 %, the best case of 8B on a TPU v6e; PR 11267 has -34 % on an A100 (below)",
    ),
    "lora load": Constant(
        27e-3, "s", "published", "huggingface/peft issue 981: load_adapter, the first of them; beside reading"
    ),
    "gpu engine start": Constant(
        14.18,
        "s",
        "published",
        "vllm-project/vllm PR 11005: engine init of Llama-3-8B without torch.compile (39.34 with)",
    ),
    "gpu price": Constant(
        2.50,
        "$/h",
        "assumed",
        "an H100; quotes of May 2026 are from 1.99 to 5.00 (mercatus-ai.com/blog/cloud-gpu-pricing)",
    ),
    "gpu own step": Constant(
        1.87, "x reading", "measured", f"{RESULTS}, CUDA devices: Masquerade's step of 32 rows, 8 of 32 layers, H200"
    ),
    "gpu copy": Constant(
        3956 / 4800,
        "of bandwidth",
        "measured",
        "the same: a copy's GB/s, over the 4.8 TB/s that NVIDIA gives for an H200",
    ),
    # SmolLM2 on one CPU core
    "cpu one": Constant(55.0, "tokens/s", "measured", f"{RESULTS}, Beside peers on one core: the base, 1 stream"),
    "cpu sixteen": Constant(519.0, "tokens/s", "measured", "the same, 16 streams"),
    "cpu prompts": Constant(1250.0, "tokens/s", "measured", "the same, prompts of 16 streams"),
    "cpu context": Constant(92.0, "positions", "computed", "the same: prompts of 60 and half of 64 tokens, on average"),
    "cpu position": Constant(
        30 * (1.36e-3 * 0.31 - 0.182e-3 * 0.28) / 448 / 16,
        "s",
        "measured",
        f"{RESULTS}, Decoding on one core: 16 decodes, contexts of 512 and 64, times 30 layers",
    ),
    "cpu masks": Constant(504.0, "tokens/s", "measured", "Beside peers: 16 streams with 1 persona (505 with 8)"),
    "cpu rows": Constant(16, "requests", "assumed", "the most streams that were measured"),
    "cpu chunk": Constant(512, "tokens", "assumed", "our default of a step"),
    "cpu budget": Constant(2**30, "bytes", "assumed", "our defaults of --mask-bytes and --cache-bytes"),
    "cpu mask": Constant(
        155_520 / 64 * 330 + 4 * 45_000,
        "bytes",
        "computed",
        "docs/operations.md: a list in native kernels, 45,000 weights and 155,520 outputs",
    ),
    "cpu mask load": Constant(11.5e-3, "s", "measured", f"{RESULTS}, Masks as files: read and verify 84,739 weights"),
    "cpu lora": Constant(2 * 16 * 30 * 3264, "bytes", "computed", "rank 16 of o_proj and down_proj in bf16"),
    "cpu lora none": Constant(313.0, "tokens/s", "measured", "Beside peers: transformers, 16 streams"),
    "cpu lora one": Constant(280.0, "tokens/s", "measured", "the same: PEFT, 1 LoRA, 16 streams"),
    "cpu lora eight": Constant(174.0, "tokens/s", "measured", "the same: PEFT, 8 LoRAs in a batch"),
    "cpu system bytes": Constant(2 * 2 * 30 * 192, "bytes", "computed", "keys and values of a position in bf16"),
    "cpu weights": Constant(269_060_000, "bytes", "measured", f"{RESULTS}, What a server takes: 256.6 MiB"),
    "cpu model load": Constant(
        3.75, "s", "measured", f"{RESULTS}, The start of a server: SmolLM2 from a folder, to the first answer"
    ),
    "cpu price": Constant(0.04, "$/h", "assumed", "one core. Costs are proportional"),
}


def _get(name: str) -> float:
    return CONSTANTS[name].value


# What is varied: the constants that change, and the values that they then have.
VARIATIONS: dict[str, dict[str, float]] = {
    "as assumed": {},
    "Zipf's exponent 0.6": {"alpha": 0.6},
    "Zipf's exponent 1.3": {"alpha": 1.3},
    "system prompts of 200 tokens": {"system tokens": 200},
    "system prompts of 2000 tokens": {"system tokens": 2000},
    "10 GB for personas": {"gpu budget": 10e9},
    "personas from a network of 1 Gbit/s": {"disk": 0.125e9},
    "products at a quarter of the peak": {"gpu utilisation": 0.25},
    "masks' launches hidden, only their bytes read": {
        "gpu mask step": 0.0,
        "gpu mask each": _get("gpu mask") * _get("gpu step") / _get("gpu weights"),
    },
    "the base's step of Masquerade, 1.87 x reading": {
        "gpu step": _get("gpu own step") * _get("gpu weights") / (_get("gpu copy") * _get("gpu bandwidth"))
    },
    "LoRAs at -34 % throughput": {"gpu lora throughput": 0.66},
    "a disk of 7 GB/s, models swapped into a warm engine": {"gpu engine start": 0.0, "disk": 7e9},
}


@dataclass(frozen=True)
class Setting:
    """A machine with its price and the ways to serve personas on it."""

    name: str
    machine: Machine
    ways: dict[str, Way]
    price: float  # $ an hour


def make_settings(constants: dict[str, Constant] = CONSTANTS) -> dict[str, Setting]:
    """The two settings, of these constants."""
    c = {name: constant.value for name, constant in constants.items()}
    return {"gpu": _make_gpu(c), "cpu": _make_cpu(c)}


def _make_gpu(c: dict[str, float]) -> Setting:
    product = c["gpu weights"] / (c["gpu peak"] * c["gpu utilisation"])  # a token's: 2 FLOP a weight of 2 bytes
    speed = c["gpu weights"] / c["gpu step"]  # bytes/s that one stream reaches
    rows, chunk, budget = (int(c[f"gpu {name}"]) for name in ("rows", "chunk", "budget"))
    machine = Machine(c["gpu step"] - product, product, product, c["gpu position"] / speed, rows, chunk, budget)
    read = c["disk"] * c["verified"]
    ways = {
        "masks": Way(
            int(c["gpu mask"]), c["gpu mask file"] / read + c["gpu mask load"], c["gpu mask step"], c["gpu mask each"]
        ),
        "prompts": Way(int(c["system tokens"] * c["gpu position"]), prompt=int(c["system tokens"])),
        "LoRAs": Way(
            int(c["gpu lora"]),
            c["gpu lora"] / c["disk"] + c["lora load"],
            c["gpu step"] * (1 / c["gpu lora throughput"] - 1),
        ),
        "models": Way(int(c["gpu weights"]), c["gpu weights"] / c["disk"] + c["gpu engine start"], alone=True),
    }
    return Setting("8B on an H100", machine, ways, c["gpu price"])


def _make_cpu(c: dict[str, float]) -> Setting:
    one, sixteen = 1 / c["cpu one"], 16 / c["cpu sixteen"]
    row = (sixteen - one) / 15 - c["cpu context"] * c["cpu position"]
    fixed = one - row - c["cpu context"] * c["cpu position"]
    rows, chunk, budget = (int(c[f"cpu {name}"]) for name in ("rows", "chunk", "budget"))
    machine = Machine(fixed, row, 1 / c["cpu prompts"], c["cpu position"], rows, chunk, budget)
    loras = [16 / c[f"cpu lora {name}"] for name in ("none", "one", "eight")]
    ways = {
        "masks": Way(int(c["cpu mask"]), c["cpu mask load"], 16 / c["cpu masks"] - sixteen),
        "prompts": Way(int(c["system tokens"] * c["cpu system bytes"]), prompt=int(c["system tokens"])),
        "LoRAs": Way(int(c["cpu lora"]), c["lora load"], loras[1] - loras[0], (loras[2] - loras[1]) / 7),
        "models": Way(int(c["cpu weights"]), c["cpu model load"], alone=True),
    }
    return Setting("SmolLM2 on a CPU core", machine, ways, c["cpu price"])
