"""What every test starts with: a small model on disk, a store with personas, and servers of it; and what must be true
of a store whose server is dead.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from maskstore import Mask, Registry, fsck
from masquerade.model import Base, load
from tests import world
from tests.serving import Server, free_port, stop, wait_until_ready
from tests.zygote import Zygote

NAME = "tiny"
CONTEXT = 512
# name -> (share that is pruned, default gamma, default phase); sparse and dense encodings, both phases
PERSONAS = {
    "grim": (0.003, 0.0, "all"),
    "merry": (0.3, 0.0, "all"),
    "terse": (0.01, 0.0, "decode"),
    "lofty": (0.5, 0.3, "all"),
    "humble": (0.05, 0.0, "decode"),
    "salty": (0.1, 0.6, "all"),
}


@dataclass(frozen=True)
class Scene:
    """A folder with a model, its masks as files, and a way to start servers at once."""

    folder: Path
    model: Path
    masks: dict[str, Mask]
    base: Base
    zygote: Zygote

    def new_store(self, name: str) -> Path:
        """A store with all personas."""
        root = self.folder / name
        registry = Registry(root)
        for persona, mask in self.masks.items():
            registry.publish(persona, registry.store.add(mask))
        return root

    @contextmanager
    def serve(
        self, store: Path, *options: str, zygote: Zygote | None = None, model: Path | None = None
    ) -> Iterator[Server]:
        """A server of a store until the block ends; it may have been killed by then."""
        port = free_port()
        log = store.parent / f"{store.name}.log"
        where = ["--host", "127.0.0.1", "--port", str(port), "--store", str(store)]
        process = (zygote or self.zygote).start(["serve", "--model", str(model or self.model), *where, *options], log)
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            wait_until_ready(server)
            yield server
        finally:
            stop(process)


@contextmanager
def make_scene(parent: Path | None = None) -> Iterator[Scene]:
    """A scene that goes with the block."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="masquerade-reliability-", dir=parent))
    zygote = Zygote()
    try:
        model = world.make_model(folder / NAME, max_position_embeddings=CONTEXT)
        base = load(str(model), device="cpu")
        yield Scene(folder, model, dict(_make_masks(base)), base, zygote)
    finally:
        zygote.close()
        shutil.rmtree(folder, ignore_errors=True)


def _make_masks(base: Base) -> Iterator[tuple[str, Mask]]:
    from dataclasses import replace

    for seed, (name, (share, gamma, phase)) in enumerate(PERSONAS.items()):
        mask = world.make_mask(base, share, seed, name)
        yield name, replace(mask, info=replace(mask.info, gamma=gamma, phase=phase))


def ailments(store: Path) -> list[str]:
    """Everything that is wrong with a store, whether or not a server runs on it."""
    found = [f"{one.kind} {one.subject}: {one.message}" for one in fsck(store).findings]
    for path in (store / "jobs" / "jobs.sqlite", store / "keys.sqlite"):
        if path.exists():
            with closing(sqlite3.connect(path)) as db:
                found += [f"{path.name}: {row[0]}" for row in db.execute("pragma integrity_check") if row[0] != "ok"]
    return found


def mask_file(store: Path, digest: str) -> Path:
    """Where a store has the mask of a digest."""
    return store / "masks" / digest[:2] / f"{digest}.safetensors"
