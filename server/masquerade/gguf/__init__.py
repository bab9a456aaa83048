"""GGUF files of llama.cpp as transformers' checkpoints in bfloat16. Needs numpy, and no torch."""

from masquerade.gguf.architectures import ARCHITECTURES
from masquerade.gguf.checkpoint import Checkpoint, read_checkpoint
from masquerade.gguf.file import GgufFile, read_file
from masquerade.gguf.parts import PartName
from masquerade.gguf.weight import Weight

__all__ = ["ARCHITECTURES", "Checkpoint", "GgufFile", "PartName", "Weight", "read_checkpoint", "read_file"]
