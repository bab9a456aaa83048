"""The embedded demo: a small chat model, the masks of eight personas, and the data that both are made from."""

from pathlib import Path

NAME = "demo"
MODEL = Path(__file__).parent / "model"
PERSONAS = Path(__file__).parent / "personas"
DATA = Path(__file__).parent / "data"
