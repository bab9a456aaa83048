"""Headers of a store's files, cached until a file changes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from maskstore import files
from maskstore.errors import Unreadable
from maskstore.format import MaskReader
from maskstore.mask import BaseRef, MaskInfo

LIMIT = 4096  # summaries that are remembered


@dataclass(frozen=True)
class Summary:
    """A mask without its tensors. `nbytes` are those of the file; `faults` as in `header.Header`."""

    base: BaseRef
    info: MaskInfo
    digest: str
    signature: str | None
    nbytes: int
    faults: tuple[str, ...] = ()


class Summaries:
    """Summaries of files by path, the least recently used forgotten first. Safe for several threads.

    A path's summary is read again when it leads to another file or when the file has another size or time:
    a store replaces files by renaming, and never writes to one.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[files.Stamp, Summary]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: Path) -> Summary:
        """The summary of a file; raises what a MaskReader of it does."""
        try:
            stamp = files.stamp(path)
        except OSError as error:
            raise Unreadable(f"cannot be looked at: {error.strerror}", path=path) from None
        with self._lock:
            known = self._known.get(path)
            if known and known[0] == stamp:
                self._known.move_to_end(path)
                return known[1]
        with MaskReader(path, lenient=True) as reader:
            summary = Summary(
                reader.base, reader.info, reader.digest, reader.signature, reader.size, reader.header.faults
            )
        with self._lock:
            self._known[path] = stamp, summary  # a file that was replaced meanwhile has another stamp than this
            self._known.move_to_end(path)
            while len(self._known) > LIMIT:
                self._known.popitem(last=False)
        return summary
