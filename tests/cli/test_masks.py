"""`masquerade masks`, from naming to upkeep, on a real store; only an adapter needs a model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskstore import BaseRef, Mask, MaskInfo, Registry, encode, fingerprint, signing, write_mask
from tests.cli.running import fail, masquerade, succeed
from tests.maskstore.test_signing import sign_tensors
from tests.world import CERTIFICATE, CURVE

NAME = "model.layers.0.mlp.up_proj"
At = tuple[str, str, str, str]


def make_mask(mark: str, seed: int, persona: str) -> Mask:
    pruned = np.random.default_rng(seed).random((96, 64)) < 0.05
    return Mask(BaseRef(mark, "tiny"), {NAME: encode(pruned)}, MaskInfo(persona=persona, score="random"))


@pytest.fixture
def registry(tiny_folder: Path, tmp_path: Path) -> Registry:
    """Two personas; the first has two generations."""
    registry = Registry(tmp_path / "store")
    mark = fingerprint(tiny_folder)
    for seed, persona in enumerate(("calm", "calm", "loud")):
        registry.publish(persona, registry.store.add(make_mask(mark, seed, persona)))
    return registry


@pytest.fixture
def at(tiny_folder: Path, registry: Registry) -> At:
    return ("--model", str(tiny_folder), "--store", str(registry.store.root))


def test_names_history_and_rollback(at: At, registry: Registry) -> None:
    old, new = (generation.digest for generation in reversed(registry.history("calm")))
    assert succeed("masks", "rollback", "calm", *at)["digest"] == old
    assert succeed("masks", "rollback", "calm", "--to", "2", *at)["digest"] == new
    assert succeed("masks", "rollback", "calm", "--to", old[:12], *at)["generation"] == 1
    assert "no generation 9" in fail(1, "masks", "rollback", "calm", "--to", "9", *at)
    assert succeed("masks", "rename", "calm", "serene", *at)["persona"] == "serene"
    assert succeed("masks", "alias", "quiet", "serene", *at)["aliases"] == ["quiet"]
    shown = succeed("masks", "show", "quiet", *at)
    assert (shown["persona"], shown["digest"]) == ("serene", old)
    assert [past["generation"] for past in shown["history"]] == [2, 1]
    assert len(succeed("masks", "trim", "serene", "--keep", "1", *at)["forgotten"]) == 0  # the current one is the older
    assert succeed("masks", "rm", "serene", *at) == {"removed": "serene"}
    assert "no persona" in fail(1, "masks", "show", "quiet", *at)


def test_the_curve_of_a_certificate_is_shown_as_a_table(at: At, registry: Registry) -> None:
    loud = registry.store.open(registry.resolve("loud").digest)
    registry.publish_built(replace(loud, info=replace(loud.info, certificate=CERTIFICATE)))
    assert succeed("masks", "show", "loud", *at)["certificate"]["curve"] == CURVE
    said = masquerade("masks", "show", "loud", *at).stdout
    rows = {line.split()[1]: line.split()[3::2] for line in said.splitlines() if line.startswith("│")}
    assert rows["0.25"] == ["+0.620", "x1.050", "x0.990", "96%"]
    assert list(rows) == ["0.9", "0.75", "0.5", "0.25", "0"]
    assert "│" not in masquerade("masks", "show", "calm", *at).stdout


def test_defaults_notes_and_tags(at: At) -> None:
    set_ = succeed("masks", "set", "calm", "--gamma", "0.5", "--note", "soft", "--tag", "npc", "--tag", "inn", *at)
    assert (set_["gamma"], set_["notes"], set_["tags"]) == (0.5, "soft", ["inn", "npc"])
    assert [row["persona"] for row in succeed("masks", "ls", "--tag", "npc", *at)["personas"]] == ["calm"]
    assert succeed("masks", "set", "calm", "--mask-gamma", "--untag", "inn", *at)["gamma"] is None
    assert "gamma 2.0 is not within" in fail(2, "masks", "set", "calm", "--gamma", "2", *at)


def test_files_go_out_whole_or_as_differences_and_come_back_the_same(
    at: At, registry: Registry, tmp_path: Path
) -> None:
    digests = {generation.name: generation.digest for generation in registry.names()}
    whole, delta = tmp_path / "calm.safetensors", tmp_path / "delta.safetensors"
    assert succeed("masks", "export", "calm", whole, *at)["parent"] is None
    assert succeed("masks", "verify", whole, *at[:2])["digest"] == digests["calm"]
    assert f"{whole} exists; give another path, or --force" in fail(2, "masks", "export", "loud", whole, *at)
    assert succeed("masks", "verify", whole, *at[:2])["digest"] == digests["calm"]
    succeed("masks", "compose", "near = calm | loud", *at)
    near = registry.resolve("near").digest
    assert succeed("masks", "export", "near", delta, "--against", "calm", *at)["parent"] in (digests["calm"], None)
    other = (*at[:3], str(tmp_path / "other"))
    for file in (whole, delta):
        succeed("masks", "import", file, *other)
    assert {(row["persona"], row["digest"]) for row in succeed("masks", "ls", *other)["personas"]} == {
        ("calm", digests["calm"]),
        ("near", near),
    }
    assert "expected nothing to be current" in fail(
        1, "masks", "import", delta, "--name", "calm", "--expect", "none", *other
    )
    whole.write_bytes(whole.read_bytes()[:-1])
    fail(1, "masks", "import", whole, *other)


def test_an_adapter_goes_out_as_a_folder(at: At, registry: Registry, tmp_path: Path) -> None:
    """At the gamma at which the persona is served, unless another is given; without the phase, which it cannot have."""
    calm, folder = registry.store.open(registry.resolve("calm").digest), tmp_path / "adapters" / "calm"
    channels = np.zeros((96, 64), bool)
    channels[:, [5, 9]] = True
    registry.publish_built(Mask(calm.base, {NAME: encode(channels)}, MaskInfo("few", "random", phase="decode")))
    assert f"of the {calm.pruned} weights that 'calm' prunes are outside of whole input channels" in fail(
        2, "masks", "export", "calm", "--as", "lora", "--to", folder, *at
    )
    succeed("masks", "set", "calm", "--gamma", "0.5", *at)
    done = succeed("masks", "export", "calm", "--as", "shira", "--to", folder, *at)
    assert (done["digest"], done["kind"], done["gamma"], done["phase"]) == (calm.digest, "shira", 0.5, "all")
    assert done["nbytes"] == (folder / "adapter_model.safetensors").stat().st_size
    said = ("masks", "export", "few", "--as", "lora", "--to", folder, "--dtype", "bfloat16", "--gamma", "0.25", *at)
    before = (folder / "adapter_config.json").read_bytes()
    assert f"{folder} has files in it; give another path, or --force" in fail(2, *said)
    assert (folder / "adapter_config.json").read_bytes() == before
    said = (*said, "--force")
    done = succeed(*said)
    assert (done["persona"], done["rank"], done["gamma"]) == ("few", 2, 0.25)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert "an adapter applies to the prompt too" in masquerade(*said).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a FILE for the mask"),
        (("a.safetensors", "--gamma", "0.5"), "--gamma and --dtype are for an adapter and need --as"),
        (("--to", "folder"), "--gamma and --dtype are for an adapter and need --as"),
        (("--as", "lora"), "--as lora writes a folder: give --to FOLDER"),
        (("a.safetensors", "--as", "lora", "--to", "folder"), "neither FILE nor --against"),
        (("--as", "shira", "--to", "folder", "--against", "loud"), "neither FILE nor --against"),
    ],
)
def test_a_mask_goes_to_a_file_and_an_adapter_to_a_folder(at: At, arguments: tuple[str, ...], words: str) -> None:
    assert words in fail(2, "masks", "export", "calm", *arguments, *at)


def test_a_store_that_is_not_there_is_said_and_not_made(at: At, tmp_path: Path) -> None:
    typo = (*at[:3], str(tmp_path / "typo"))
    for command in (("ls",), ("show", "calm"), ("gc",)):
        assert f"there is no store in {tmp_path / 'typo'}" in fail(2, "masks", *command, *typo)
    assert not (tmp_path / "typo").exists()


def test_compose_follows_the_sets(at: At, registry: Registry) -> None:
    a, b = (registry.store.open(registry.resolve(name).digest) for name in ("calm", "loud"))
    made = succeed("masks", "compose", "both", "=", "calm & loud", *at)
    assert registry.store.open(made["digest"]) == a & b
    made = succeed("masks", "compose", "odd = (calm|loud)-(calm&loud)", *at)
    assert registry.store.open(made["digest"]) == (a | b) - (a & b)
    for words in (("calm",), ("calm", "="), ("=", "calm")):
        assert "is not NAME = EXPRESSION; for example: masquerade masks compose" in fail(
            2, "masks", "compose", *words, *at
        )
    assert "is no persona" in fail(1, "masks", "compose", "x = nobody", *at)
    assert "is an empty mask" in fail(2, "masks", "compose", "void = calm - calm", *at)
    made = succeed("masks", "compose", "void = calm - calm", "--force", *at)
    assert not registry.store.open(made["digest"]).pruned


def test_a_damaged_mask_is_listed_beside_the_others(at: At, registry: Registry) -> None:
    path = registry.store.path(registry.resolve("calm").digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:100])
    done = masquerade("masks", "ls", *at, "--json")
    assert done.status == 0, done.stderr
    calm, loud = json.loads(done.stdout)["personas"]
    assert (calm["persona"], loud["persona"], loud["damaged"]) == ("calm", "loud", None)
    assert str(path) in calm["damaged"]
    assert "calm is damaged: " in done.stderr
    assert "fsck" in done.stderr
    path.unlink()
    assert "no mask" in succeed("masks", "ls", *at)["personas"][0]["damaged"]


def test_diff_compares_personas_and_files(at: At, registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "calm.safetensors"
    succeed("masks", "export", "calm", file, *at)
    assert succeed("masks", "diff", "calm", file, *at)["total"]["jaccard"] == 1.0
    found = succeed("masks", "diff", "calm", "loud", "--plot", tmp_path / "heat.png", *at)
    a, b = (~registry.store.open(registry.resolve(name).digest).targets[NAME].to_keep() for name in ("calm", "loud"))
    assert found["total"]["jaccard"] == pytest.approx((a & b).sum() / (a | b).sum())
    assert found["parts"]["mlp"]["differing"] == pytest.approx((a ^ b).mean())
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert "total" in masquerade("masks", "diff", "calm", "loud", *at).stdout


def test_gc_takes_what_nothing_refers_to_and_says_so_before(at: At, registry: Registry) -> None:
    doomed = registry.resolve("loud").digest
    succeed("masks", "pin", "loud", *at)
    succeed("masks", "rm", "loud", *at)
    assert succeed("masks", "gc", "--grace", "0", *at)["digests"] == []
    registry.unpin(doomed)
    assert succeed("masks", "gc", "--grace", "0", "--dry-run", *at)["digests"] == [doomed]
    assert doomed in registry.store
    assert succeed("masks", "gc", "--grace", "0", *at)["digests"] == [doomed]
    assert doomed not in registry.store


def test_fsck_reports_damage_and_repairs_what_it_can(at: At, registry: Registry) -> None:
    assert succeed("masks", "fsck", *at)["clean"]
    path = registry.store.path(registry.resolve("loud").digest)
    path.write_bytes(path.read_bytes()[:-3])
    done = masquerade("masks", "fsck", "--json", *at)
    assert (done.status, '"damaged"' in done.stdout, '"dangling"' in done.stdout) == (1, True, True)
    assert "moved to damaged/" in masquerade("masks", "fsck", "--repair", "--json", *at).stdout
    assert not path.exists()


def test_signed_masks_are_known_by_their_keys(at: At, registry: Registry, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    public = succeed("masks", "keygen", key)["public"]
    assert key.stat().st_mode & 0o077 == 0
    assert "File exists" in fail(1, "masks", "keygen", key)
    assert "No such file" in fail(1, "masks", "sign", "calm", "--key", tmp_path / "none", *at)
    (tmp_path / "long").write_text(f"{key.read_text().strip()}0")
    said = fail(2, "masks", "sign", "calm", "--key", tmp_path / "long", *at)
    assert f"{tmp_path / 'long'}: this is not a private key" in said
    assert key.read_text()[:16] not in said
    (tmp_path / "binary").write_bytes(b"\xff" * 32)
    assert "is not a private key" in fail(2, "masks", "sign", "calm", "--key", tmp_path / "binary", *at)
    assert succeed("masks", "show", "calm", *at)["signature"] is None
    succeed("masks", "sign", "calm", "--key", key, *at)
    signature = {"key": public, "covers": "everything", "valid": True, "label": None}
    assert succeed("masks", "show", "calm", *at)["signature"] == signature
    file = tmp_path / "calm.safetensors"
    succeed("masks", "export", "calm", file, *at)
    assert succeed("masks", "verify", file)["signature"] == signature
    assert f"signed by {public[:16]}: tensors and metadata" in masquerade("masks", "verify", file).stdout
    other = (*at[:3], str(tmp_path / "other"))
    assert "none of 0 keys" in fail(1, "masks", "import", file, "--require-signed", *other)
    assert succeed("masks", "trust", "ann", public, *other)["trusted"] == {public: "ann"}
    assert succeed("masks", "import", file, "--require-signed", *other)["persona"] == "calm"
    assert succeed("masks", "show", "calm", *other)["signature"]["label"] == "ann"
    assert succeed("masks", "distrust", "ann", *other)["trusted"] == {}


def test_a_signature_of_tensors_only_is_shown_as_one_and_not_enough(at: At, registry: Registry, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    mask = registry.store.open(registry.resolve("calm").digest)
    file, forged = tmp_path / "old.safetensors", tmp_path / "forged.safetensors"
    write_mask(sign_tensors(mask, private), file)
    write_mask(replace(signing.sign(mask, private), info=replace(mask.info, gamma=0.9)), forged)
    assert succeed("masks", "verify", file)["signature"]["covers"] == "tensors"
    assert "tensors only" in masquerade("masks", "verify", file).stdout
    assert "does not fit" in fail(1, "masks", "verify", forged)
    other = (*at[:3], str(tmp_path / "other"))
    succeed("masks", "trust", "ann", public, *other)
    assert "covers only the tensors" in fail(1, "masks", "import", file, "--require-signed", *other)
    assert "does not fit" in fail(1, "masks", "import", forged, "--require-signed", *other)
    tolerant = ("--require-signed", "--accept-tensor-signatures")
    assert succeed("masks", "import", file, *tolerant, *other)["persona"] == "calm"


def test_lists_are_tables_for_people(at: At) -> None:
    shown = masquerade("masks", "ls", *at).stdout
    assert "calm" in shown
    assert "digest" in shown


def test_light_commands_import_neither_torch_nor_sqlalchemy(at: At) -> None:
    code = (
        "import sys; from masquerade.cli import main\n"
        "for line in (['--help'], ['version'], ['config', 'show'], ['masks', 'ls', *sys.argv[1:]]):\n"
        "    sys.argv = ['masquerade', *line]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, line\n"
        "sys.exit(' '.join({'torch', 'sqlalchemy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *at], capture_output=True, env=os.environ, check=False)
    assert done.stderr == b"\n"  # what `sys.exit` prints: the names, of which there are none
    assert b"calm" in done.stdout


def test_what_contradicts_itself_or_is_not_there_is_refused(at: At, tmp_path: Path) -> None:
    assert "give --gamma or --mask-gamma" in fail(2, "masks", "set", "calm", "--gamma", "0.3", "--mask-gamma", *at)
    assert "there is no store in" in fail(2, "masks", "fsck", "--store", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
