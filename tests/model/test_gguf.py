"""GGUF files: what is read is what gguf and transformers read, and what is damaged is refused by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter, quants
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from maskstore import fingerprint
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.gguf import ARCHITECTURES, read_checkpoint
from masquerade.gguf.weight import is_readable, round_to_bfloat16
from masquerade.model import find_targets, load
from masquerade.model.short_attention import FUSED, NAME
from masquerade.model.vocabulary import read_tokenizer
from masquerade.sources import find_model
from tests import world
from tests.model import ggufs
from tests.model.ggufs import Kind

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3": ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-128": ("qwen3", {"head_dim": 128}),
    "smollm3": ("smollm3", {"head_dim": 16, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
}
WRITABLE = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
PROMPT = torch.tensor([[1, *range(10, 60)]])  # longer than every sliding window


def make(name: str) -> Any:
    model_type, changes = MODELS[name]
    return ggufs.make_model(model_type, **changes)


def compare(model: Any, expected: Any) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name].data, tensor)] == []


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    """Logits with torch's fused attention, which `load` replaces for short sequences."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(FUSED)
    logits: torch.Tensor = model(PROMPT).logits
    return logits


class TestWeights:
    @pytest.mark.parametrize("name", MODELS)
    def test_each_architecture_is_the_model_it_was_made_from(self, tmp_path: Path, name: str) -> None:
        model = make(name)
        written = ggufs.write(tmp_path / "m.gguf", model)
        base = load(str(written.path), device="cpu")
        assert type(base.model) is type(model)
        compare(base.model, written.expected)
        assert torch.equal(answer(base.model), answer(model))
        assert len(find_targets(base.model)) == 7 * model.config.num_hidden_layers

    @pytest.mark.parametrize("name", MODELS)
    def test_each_architecture_is_served(self, tmp_path: Path, name: str) -> None:
        model = make(name)
        base = load(str(ggufs.write(tmp_path / "m.gguf", model).path), device="cpu", dtype="float32")
        engine, prompt = Engine(base, EngineConfig()), PROMPT[0].tolist()
        tokens = engine.generate([Request(prompt, 16, lambda _: None, sampling=SamplingParams(temperature=0))])[0]
        plain = model.float()
        spoken = [token for token in tokens if token not in base.ends]
        assert world.speak(plain, plain, prompt, 16, base.ends).agrees(spoken)

    @pytest.mark.parametrize("name", MODELS)
    def test_the_config_is_the_one_it_was_made_from(self, tmp_path: Path, name: str) -> None:
        model = make(name)
        base = load(str(ggufs.write(tmp_path / "m.gguf", model).path), device="cpu")
        told, ours = model.config.to_dict(), base.model.config.to_dict()
        assert {key: (value, ours.get(key)) for key, value in told.items() if value != ours.get(key)} == {}

    def test_mistral_is_a_llama_to_llama_cpp(self, tmp_path: Path) -> None:
        model = ggufs.make_model("mistral", sliding_window=None)
        base = load(str(ggufs.write(tmp_path / "m.gguf", model).path), device="cpu")
        assert torch.equal(answer(base.model), answer(model))

    @pytest.mark.parametrize("kind", WRITABLE)
    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_quantised_weights_are_those_that_gguf_dequantises(self, tmp_path: Path, kind: Kind, name: str) -> None:
        model = make(name)
        written = ggufs.write(tmp_path / "m.gguf", model, ggufs.quantise(kind))
        base = load(str(written.path), device="cpu")
        compare(base.model, written.expected)
        model.load_state_dict(dict(written.expected), strict=False)
        assert torch.equal(answer(base.model), answer(model))

    @pytest.mark.parametrize("kind", [kind for kind in Kind if is_readable(kind)])
    def test_every_type_that_gguf_can_dequantise(self, tmp_path: Path, kind: Kind) -> None:
        rng = np.random.default_rng(kind)

        def pack(_: str, weights: NDArray[np.float32]) -> tuple[NDArray[Any], Kind]:
            if weights.ndim == 1:
                return weights, Kind.F32
            rows, columns = weights.shape
            values, size = GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 0x3C, (rows, columns // values * size), np.uint8)  # as half, always finite
            return raw.view({Kind.F32: np.float32, Kind.F16: np.float16}.get(kind, np.uint8)), kind

        model = ggufs.make_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
        written = ggufs.write(tmp_path / "m.gguf", model, pack)
        base = load(str(written.path), device="cpu")
        compare(base.model, written.expected)
        base.model.save_pretrained(tmp_path / "saved")
        assert fingerprint(tmp_path / "saved") == base.fingerprint

    def test_gguf_can_dequantise_what_llama_cpp_writes(self) -> None:
        common = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
        common += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS"]
        assert [name for name in common if not is_readable(Kind[name])] == []

    def test_rounding_is_torchs(self) -> None:
        bits = np.concatenate([np.arange(0, 2**32, 65521), np.arange(2**16) << 15, [0x7F7FFFFF, 0xFF800000]])
        values = bits.astype(np.uint32).view(np.float32)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        rounded, nan = round_to_bfloat16(values), np.isnan(values)
        assert np.array_equal(rounded[~nan], expected[~nan])
        assert torch.from_numpy(rounded[nan].view(np.int16)).view(torch.bfloat16).isnan().all()

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_another_dtype_holds_the_same_values(self, tmp_path: Path, dtype: str) -> None:
        written = ggufs.write(tmp_path / "m.gguf", make("qwen3"), ggufs.quantise(Kind.Q8_0))
        base = load(str(written.path), device="cpu", dtype=dtype)
        assert base.dtype == getattr(torch, dtype)
        compare(base.model, {name: tensor.to(base.dtype) for name, tensor in written.expected.items()})

    def test_bfloat16_unless_told_otherwise(self, tmp_path: Path) -> None:
        written = ggufs.write(tmp_path / "m.gguf", make("llama"))
        assert load(str(written.path), device="cpu").dtype == torch.bfloat16

    @pytest.mark.parametrize("how", ["int8", "nf4"])
    def test_a_dequantised_base_can_be_quantised(self, tmp_path: Path, how: str) -> None:
        pytest.importorskip("bitsandbytes")
        written = ggufs.write(tmp_path / "m.gguf", make("llama"), ggufs.quantise(Kind.Q8_0))
        dense = load(str(written.path), device="cpu")
        base = load(str(written.path), device="cpu", quantization=how)
        assert base.fingerprint == dense.fingerprint
        assert (answer(base.model) - answer(dense.model)).norm() < 0.5 * answer(dense.model).norm()

    @pytest.mark.skipif(not find_spec("accelerate"), reason="transformers reads GGUF only with accelerate")
    @pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
    @pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3-128", "gemma2", "gemma3"])
    def test_transformers_reads_the_same(self, tmp_path: Path, name: str, kind: Kind) -> None:
        """But for what it does not read: the width of Qwen3's heads, the scale of Gemma's attention and positions."""
        written = ggufs.write(tmp_path / "m.gguf", make(name), ggufs.quantise(kind))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.bfloat16)
        ours = load(str(written.path), device="cpu").model
        compare(ours, dict(theirs.named_parameters()))
        if "gemma" not in name:
            assert torch.equal(answer(ours), answer(theirs))


class TestFingerprint:
    @pytest.mark.parametrize("name", MODELS)
    def test_a_gguf_and_the_folder_saved_from_it_are_one_base(self, tmp_path: Path, name: str) -> None:
        written = ggufs.write(tmp_path / "m.gguf", make(name), ggufs.quantise(Kind.Q8_0))
        base = load(str(written.path), device="cpu")
        base.model.save_pretrained(tmp_path / "saved")
        base.tokenizer.save_pretrained(tmp_path / "saved")
        again = load(str(tmp_path / "saved"), device="cpu", dtype="bfloat16")
        assert base.fingerprint == find_model(str(written.path)).fingerprint() == again.fingerprint
        assert again.ends == base.ends
        assert torch.equal(answer(again.model), answer(base.model))

    def test_other_weights_are_another_base(self, tmp_path: Path) -> None:
        one, other = (
            ggufs.write(tmp_path / f"{seed}.gguf", ggufs.make_model("llama", seed=seed)).path for seed in (0, 1)
        )
        assert find_model(str(one)).fingerprint() != find_model(str(other)).fingerprint()

    def test_it_needs_no_torch(self, tmp_path: Path) -> None:
        path = ggufs.write(tmp_path / "m.gguf", make("llama")).path
        code = f"""
import sys
from masquerade.sources import find_model
find_model({str(path)!r}).fingerprint()
assert "torch" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_the_model_and_little_more(tmp_path: Path) -> None:
    """Measured as what the system gives the process, because torch's tensors are no Python objects."""
    path = tmp_path / "m.gguf"

    def pack(_: str, weights: NDArray[np.float32]) -> tuple[NDArray[Any], Kind]:
        if weights.ndim == 1:
            return weights, Kind.F32
        values, size = GGML_QUANT_SIZES[Kind.Q4_0]
        return np.full((weights.shape[0], weights.shape[1] // values * size), 0x22, np.uint8), Kind.Q4_0

    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "tie_word_embeddings": True}
    ggufs.write(path, ggufs.make_model("llama", **sizes), pack)
    code = f"""
import json, re
from pathlib import Path
from masquerade.model import load

def resident(key):
    return 1024 * int(re.search(rf"{{key}}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load({str(tmp_path / "small.gguf")!r}, device="cpu")
before = resident("VmRSS")
base = load({str(path)!r}, device="cpu")
tensors = [tensor.numel() for tensor in base.model.parameters()]
print(json.dumps([resident("VmHWM") - before, 2 * sum(tensors), 4 * max(tensors)]))
"""
    ggufs.write(tmp_path / "small.gguf", make("llama"))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    taken, model, tensor = json.loads(done.stdout)
    assert model > 2**27
    assert taken <= model + tensor


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return ggufs.write(path, ggufs.make_model("llama", num_hidden_layers=1)).path.read_bytes()


class TestHostile:
    """Every file is untrusted until it is read: all that may come out of it is `UnusableModel`."""

    def refuse(self, path: Path, raw: bytes, words: str | None = None) -> None:
        path.write_bytes(raw)
        with pytest.raises(UnusableModel, match=words) as refused:
            read_checkpoint(path)
        assert str(path) in str(refused.value)

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b"", "cannot be read as GGUF"),
            (b"GGU", "is not a GGUF file"),
            (b"GGML" + bytes(100), "is not a GGUF file"),
            (b"GGUF\x01\0\0\0" + bytes(100), "is GGUF version 1; supported: 2 or 3"),
            (b"GGUF\0\0\0\x03" + bytes(100), "little-endian"),
            (b"GGUF\x03\0\0\0" + b"\xff" * 16, "the number of tensors: 18446744073709551615 do not fit"),
            (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60), "the number of keys: 1152921504606846976 do not fit"),
            (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "general.architecture: is missing"),
            (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63) + bytes(40), "key 1 of 1: takes 9223372036854775808"),
            (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99) + bytes(40), "k: is of type 99"),
            (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 2**62), "k: takes"),
            (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**59), "k: 576460752303423488 do not fit"),
            (struct.pack("<4sIQQQ1sIIQQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1, 2**63 - 1), "k: takes"),
            (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(40), "k: is an array of arrays"),
            (struct.pack("<4sIQQQ4s", b"GGUF", 3, 0, 1, 4, b"\x1b[2J") + bytes(40), r"key 1 of 1: is '.x1b\[2J'"),
            (
                struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 5000) + b"k" * 5040,
                "expected at most 1024 printable characters",
            ),
            (struct.pack("<4sIQQQ2sIQ2s", b"GGUF", 3, 0, 1, 2, b"kk", 8, 2, b"\xff\xff"), "kk.*is not UTF-8"),
        ],
    )
    def test_what_is_no_gguf(self, tmp_path: Path, raw: bytes, words: str) -> None:
        self.refuse(tmp_path / "x.gguf", raw, words)

    def test_truncated_anywhere(self, tmp_path: Path, whole: bytes) -> None:
        for end in [*range(0, len(whole) - 1, 997), len(whole) - 33]:
            self.refuse(tmp_path / "x.gguf", whole[:end])

    @pytest.mark.parametrize(
        "key",
        [
            "general.architecture",
            "llama.block_count",
            "llama.context_length",
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.attention.head_count",
            "llama.attention.layer_norm_rms_epsilon",
            "tokenizer.ggml.model",
            "tokenizer.ggml.pre",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.merges",
            "token_embd.weight",
            "output_norm.weight",
            "blk.1.attn_q.weight",
            "blk.0.ffn_norm.weight",
        ],
    )
    def test_a_missing_key_or_tensor_is_named(self, tmp_path: Path, key: str) -> None:
        path = ggufs.write(tmp_path / "m.gguf", make("llama"), leave_out=[key]).path
        with pytest.raises(UnusableModel, match=rf"m\.gguf: {key}: is missing"):
            load(str(path), device="cpu")

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            (
                "general.architecture",
                "mamba",
                "is 'mamba'; supported: llama, smollm3, granite, olmo2, mistral, qwen2, qwen3, gemma, gemma2, gemma3",
            ),
            ("general.alignment", 3, "must be a power of two"),
            ("split.count", 3, "is 3; the name of a part must end in -0000N-of-00003"),
            ("llama.expert_count", 8, "mixtures of experts"),
            ("llama.attention.scale", 0.5, "is not supported"),
            ("llama.block_count", 2**31 - 1, "but the file has only 21 tensors"),
            ("llama.block_count", 0, "must be a whole number from 1"),
            ("llama.block_count", "two", "must be a whole number from 1"),
            ("llama.context_length", 2**32 - 1, "must be a whole number from 1"),
            ("llama.embedding_length", 128, "token_embd.weight: has the shape"),
            ("llama.feed_forward_length", 95, "blk.0.ffn_gate.weight: has the shape"),
            ("llama.attention.head_count", 0, "must be a whole number from 1"),
            ("llama.attention.head_count", [4, 4], "must be a whole number from 1"),
            ("llama.attention.head_count", 5, "5 heads are not a multiple of 2"),
            ("llama.attention.head_count_kv", 4, "blk.0.attn_k.weight: has the shape"),
            ("llama.attention.key_length", 15, "llama.attention.value_length: is 16"),
            ("llama.attention.value_length", 8, "is 8; values must have the head"),
            ("llama.rope.dimension_count", 8, "is 8; rotary positions must have the head"),
            ("llama.rope.scaling.type", "longrope", "is 'longrope'; supported: none, linear, yarn"),
            ("llama.attention.causal", False, "is false: the model embeds text"),
            ("llama.rope.freq_base", float("nan"), "must be a positive number"),
            ("tokenizer.ggml.model", "bert", "is 'bert'; gpt2, llama can be read"),
            ("tokenizer.ggml.pre", "klingon", "is 'klingon'"),
            ("tokenizer.ggml.tokens", ["a"] * 1000, "are 1000, and there are 268 embeddings"),
            ("tokenizer.ggml.token_type", [1, 2], "are 2, and there are 268 tokens"),
            ("tokenizer.ggml.merges", ["x yyyyy"], "make no tokenizer"),
            ("tokenizer.ggml.eos_token_id", 268, "must be a token id below 268"),
            ("tokenizer.ggml.eot_token_id", 2**31, "must be a token id below 268"),
            ("tokenizer.chat_template", 7, "must be text"),
        ],
    )
    def test_a_value_that_cannot_be_is_named(self, tmp_path: Path, key: str, value: Any, words: str) -> None:
        def change(writer: GGUFWriter) -> None:
            writer.kv_data[0].pop(key, None)
            kinds: dict[type, Callable[..., None]] = {
                str: writer.add_string,
                list: writer.add_array,
                float: writer.add_float32,
                bool: writer.add_bool,
            }
            kinds.get(type(value), writer.add_uint32)(key, value)

        path = ggufs.write(tmp_path / "m.gguf", make("llama"), change=change).path
        with pytest.raises(UnusableModel, match=words) as refused:
            load(str(path), device="cpu")
        assert str(path) in str(refused.value)

    def test_the_windows_of_olmo3_are_refused(self, tmp_path: Path) -> None:
        """In llama.cpp OLMo 3 is an `olmo2`."""
        path = ggufs.write(tmp_path / "m.gguf", make("olmo2"), change=lambda w: w.add_sliding_window(8)).path
        with pytest.raises(UnusableModel, match=r"olmo2.attention.sliding_window: is OLMo 3's"):
            load(str(path), device="cpu")

    @pytest.mark.parametrize("value", [[1, 2, 3], ["a", "b"], "words", -1, 2.5, True])
    def test_no_value_of_another_type_is_believed(self, tmp_path: Path, value: Any) -> None:
        """Of any key that is read: it is refused, or it means what it says."""
        path = ggufs.write(tmp_path / "m.gguf", make("gemma3")).path
        add = {str: "add_string", list: "add_array", float: "add_float32", int: "add_int32", bool: "add_bool"}[
            type(value)
        ]
        more = ["split.count", "gemma3.expert_count", "gemma3.attention.sliding_window_pattern", "general.alignment"]
        for key in [*read_checkpoint(path).file.metadata, *more, "tokenizer.ggml.add_space_prefix"]:

            def change(writer: GGUFWriter, key: str = key) -> None:
                writer.kv_data[0].pop(key, None)
                getattr(writer, add)(key, value)

            changed = ggufs.write(tmp_path / "changed.gguf", make("gemma3"), change=change).path
            with suppress(UnusableModel):
                read_tokenizer(read_checkpoint(changed).file, 268)

    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("blk.0.ffn_gate_exps.weight", np.zeros((2, 96, 64), np.float32), "mixtures of experts are not supported"),
            ("blk.0.attn_rot.weight", np.zeros(3, np.float32), "is not a tensor of this architecture"),
            ("blk.9.attn_q.weight", np.zeros((64, 64), np.float32), "is not a tensor of this architecture"),
            ("rope_freqs.weight", np.full(8, 3, np.float32), "is not the scaling of Llama 3"),
            ("rope_freqs.weight", np.full(9, 3, np.float32), r"of the shape \[9\]; expected F32 \[8\]"),
        ],
    )
    def test_a_tensor_that_does_not_belong_is_named(
        self, tmp_path: Path, name: str, data: NDArray[Any], words: str
    ) -> None:
        path = ggufs.write(tmp_path / "m.gguf", make("llama"), change=lambda w: w.add_tensor(name, data)).path
        with pytest.raises(UnusableModel, match=rf"m\.gguf: {name}: .*{words}"):
            load(str(path), device="cpu")

    @pytest.mark.parametrize(
        ("model", "factor", "words"),
        [("qwen2", None, "is not supported for this architecture"), ("llama", 2.0, "is not supported together with")],
    )
    def test_frequencies_that_nothing_reads_are_refused(
        self, tmp_path: Path, model: str, factor: float | None, words: str
    ) -> None:
        def change(writer: GGUFWriter) -> None:
            writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
            if factor is not None:
                writer.add_rope_scaling_factor(factor)

        path = ggufs.write(tmp_path / "m.gguf", make(model), change=change).path
        with pytest.raises(UnusableModel, match=f"rope_freqs.weight: {words}"):
            load(str(path), device="cpu")

    @pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
    def test_a_factor_without_a_type_is_linear(self, tmp_path: Path, key: str) -> None:
        """As in llama.cpp; the second is an older name."""

        def change(writer: GGUFWriter) -> None:
            for old in ("type", "factor"):
                writer.kv_data[0].pop(f"llama.rope.scaling.{old}")
            writer.add_float32(f"llama.{key}", 2.5)

        path = ggufs.write(tmp_path / "m.gguf", make("llama-linear"), change=change).path
        rope = load(str(path), device="cpu").model.config.rope_parameters
        assert (rope["rope_type"], rope["factor"]) == ("linear", 2.5)

    def test_integers_are_no_weights(self, tmp_path: Path) -> None:
        def pack(name: str, weights: NDArray[np.float32]) -> tuple[NDArray[Any], Kind]:
            return (weights.astype(np.int8), Kind.I8) if "v_proj" in name else (weights, Kind.F32)

        real, quants.dequantize = quants.dequantize, lambda data, _: data.astype(np.float32)
        try:
            path = ggufs.write(tmp_path / "m.gguf", make("llama"), pack).path
        finally:
            quants.dequantize = real
        with pytest.raises(UnusableModel, match=r"blk.0.attn_v.weight: is of type I8, which is not supported"):
            load(str(path), device="cpu")


def test_any_byte_may_be_wrong(tmp_path: Path, whole: bytes) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "x.gguf"
    header = whole.index(b"output_norm.weight") + 200
    outcomes = set()
    for _ in range(400):
        raw = bytearray(whole)
        raw[rng.integers(header)] = rng.integers(256)
        path.write_bytes(raw)
        try:
            load(str(path), device="cpu")
            outcomes.add("loaded")
        except UnusableModel:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


class TestParts:
    def split(self, folder: Path, name: str = "Some-Model", **how: Any) -> list[Path]:
        """The parts of a file in a folder of their own. Its frequencies are read from the part that has them."""
        whole = ggufs.write(folder / f"{name}.gguf", make("llama-3"), ggufs.quantise(Kind.Q8_0)).path
        (folder / "parts").mkdir(exist_ok=True)
        return ggufs.write_parts(whole, 7, folder / "parts", **how)

    def refuse(self, path: Path, words: str) -> None:
        with pytest.raises(UnusableModel, match=words):
            load(str(path), device="cpu")

    @pytest.mark.parametrize("how", [{}, {"bare_first": True}])
    def test_the_parts_are_the_file(self, tmp_path: Path, how: dict[str, Any]) -> None:
        parts = self.split(tmp_path, **how)
        whole = load(str(tmp_path / "Some-Model.gguf"), device="cpu")
        for path in (parts[0], parts[1], parts[-1], tmp_path / "parts"):
            base = load(str(path), device="cpu")
            assert base.fingerprint == whole.fingerprint
            compare(base.model, dict(whole.model.named_parameters()))
            assert base.model.config.to_dict() == whole.model.config.to_dict()
            assert (base.ends, base.tokenizer.get_vocab()) == (whole.ends, whole.tokenizer.get_vocab())
        assert len(parts) > 3

    def test_parts_are_called_by_the_file_or_by_their_folder(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        assert {find_model(str(path)).name for path in parts} == {"Some-Model"}
        assert find_model(str(tmp_path / "parts")).name == "parts"

    def test_parts_in_a_cache_of_links_are_found(self, tmp_path: Path) -> None:
        """The hub's cache links each file to a blob of another name."""
        (tmp_path / "snapshot").mkdir()
        for number, path in enumerate(self.split(tmp_path)):
            path.rename(tmp_path / f"blob-{number}")
            (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / f"blob-{number}")
        assert load(str(tmp_path / "snapshot"), device="cpu").name == "snapshot"

    def test_a_folder_with_two_models_in_parts_says_which(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            self.split(tmp_path, name)
        self.refuse(tmp_path / "parts", r"holds 2 models; name one of them: a-00001-of-\d{5}.gguf, b-00001-of-")

    @pytest.mark.parametrize("number", [0, 1, -1])
    def test_a_missing_part_is_named(self, tmp_path: Path, number: int) -> None:
        parts = self.split(tmp_path)
        parts[number].unlink()
        other = parts[number - 1]
        for path in (other, tmp_path / "parts"):
            self.refuse(
                path, rf"{parts[number]}: is missing; {'.*' if path != other else other.name} is one of \d parts"
            )

    def test_a_part_under_another_name_is_named(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        renamed = parts[1].rename(tmp_path / "parts" / "second.gguf")
        self.refuse(renamed, r"second.gguf: split.count: is 4; the name of a part must end in -0000N-of-00004.gguf")

    def test_parts_in_the_wrong_places_are_named(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        contents = [path.read_bytes() for path in parts]
        parts[1].write_bytes(contents[2])
        self.refuse(parts[0], rf"{parts[1]}: split.no: says that this is part 3, and its name that it is part 2")

    def test_a_part_of_a_model_of_another_size_is_named(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        (tmp_path / "other").mkdir()
        other = ggufs.write(tmp_path / "Some-Model.gguf", make("llama-tied")).path
        foreign = ggufs.write_parts(other, 6, tmp_path / "other")
        assert len(foreign) == len(parts)
        parts[2].write_bytes(foreign[2].read_bytes())
        self.refuse(parts[0], rf"{parts[2]}: split.tensors.count: is 20, and 22 in {parts[0].name}; .*different files")

    def test_parts_that_were_cut_elsewhere_are_named(self, tmp_path: Path) -> None:
        """Of the same model, but others: a tensor is there twice, or not at all."""
        parts = self.split(tmp_path)
        shifted = self.split(tmp_path / "parts", bare_first=True)
        contents = [path.read_bytes() for path in shifted]
        for path in shifted:
            path.unlink()
        changed = contents[2].replace(b"split.count\x02\0\0\0\x05", b"split.count\x02\0\0\0\x04")
        parts[2].write_bytes(changed)
        self.refuse(parts[0], rf"{parts[2]}: .*: is in {parts[1].name} too; these are parts of different files")

    def test_a_damaged_part_is_named(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        parts[2].write_bytes(parts[2].read_bytes()[:-40])
        self.refuse(parts[0], rf"{parts[2]}: .*but the file has \d+ bytes")

    def test_a_wrong_tensor_is_named_with_its_part(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        raw = parts[2].read_bytes()
        for one, other in (("gate", "xxxx"), ("down", "gate"), ("xxxx", "down")):
            raw = raw.replace(f"blk.1.ffn_{one}".encode(), f"blk.1.ffn_{other}".encode())
        parts[2].write_bytes(raw)
        self.refuse(parts[0], rf"{parts[2]}: blk.1.ffn_gate.weight: has the shape")

    def test_parts_with_a_tensor_less_than_they_say(self, tmp_path: Path) -> None:
        parts = self.split(tmp_path)
        for path in parts:
            raw = path.read_bytes()
            path.write_bytes(raw.replace(b"split.tensors.count\x05\0\0\0\x16", b"split.tensors.count\x05\0\0\0\x17"))
        self.refuse(parts[1], rf"{parts[0]}: split.tensors.count: is 23, and the 4 parts have 22 tensors")


class TestSources:
    def test_a_file_is_called_by_its_name_and_a_folder_by_its_own(self, tmp_path: Path) -> None:
        folder = tmp_path / "Some-Model"
        folder.mkdir()
        path = ggufs.write(folder / "some-model.Q8_0.gguf", make("llama")).path
        assert load(str(path), device="cpu").name == "some-model.Q8_0"
        assert load(str(folder), device="cpu").name == "Some-Model"
        assert find_model(str(folder)).path == path

    def test_a_link_to_a_file_is_the_file(self, tmp_path: Path) -> None:
        real = ggufs.write(tmp_path / "blob", make("llama")).path
        (tmp_path / "model.gguf").symlink_to(real)
        assert load(str(tmp_path / "model.gguf"), device="cpu").name == "model"

    def test_a_folder_with_several_files_says_which(self, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).touch()
        with pytest.raises(UnusableModel, match=r"holds 2 models; name one of them: a\.gguf, b\.gguf"):
            load(str(tmp_path), device="cpu")

    def test_safetensors_count_before_gguf(self, tmp_path: Path) -> None:
        base = load(str(ggufs.write(tmp_path / "x.gguf", make("llama")).path), device="cpu")
        base.model.save_pretrained(tmp_path)
        assert find_model(str(tmp_path)).path == tmp_path

    @pytest.mark.parametrize("name", ["/no/such.gguf", "owner/no-such.gguf", "nowhere.gguf"])
    def test_a_file_that_is_not_there(self, name: str) -> None:
        with pytest.raises(UnusableModel, match=r"not an existing folder or \.gguf file"):
            load(name, device="cpu")

    def test_a_file_that_was_merged_again_is_whole(self, tmp_path: Path) -> None:
        """gguf-split leaves the keys of the first part, with a count of 0."""

        def change(writer: GGUFWriter) -> None:
            writer.add_uint16("split.no", 0)
            writer.add_uint16("split.count", 0)

        path = ggufs.write(tmp_path / "m.gguf", make("llama"), change=change).path
        assert load(str(path), device="cpu").name == "m"

    def test_the_reader_agrees_with_ggufs(self, tmp_path: Path) -> None:
        path = ggufs.write(tmp_path / "m.gguf", make("gemma3"), ggufs.quantise(Kind.Q4_0)).path
        ours, theirs = read_checkpoint(path).file, GGUFReader(path)
        assert {(t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors} == {
            (t.name, t.kind, t.begin, t.nbytes) for t in ours.tensors.values()
        }
        known = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata.keys() == known.keys()
        assert ours.strings("tokenizer.ggml.tokens") == known["tokenizer.ggml.tokens"]
        assert ours.numbers("tokenizer.ggml.token_type").tolist() == known["tokenizer.ggml.token_type"]
        plain = {key: value for key, value in known.items() if not isinstance(value, list)}
        single = {key: np.float32(value) if isinstance(value, float) else value for key, value in ours.metadata.items()}
        assert {key: single[key] for key in plain} == plain

    def test_every_architecture_is_tested(self) -> None:
        tested = {"mistral"} | {kind for kind, _ in MODELS.values()}
        assert {architecture.model_type for architecture in ARCHITECTURES.values()} == tested
