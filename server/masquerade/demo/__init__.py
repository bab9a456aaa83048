"""The embedded default: a small chat model, eight personas found in it, and the text both came from.

Knows where the shipped files lie. Refuses to know how they are loaded or served.
"""

from pathlib import Path

NAME = "demo"
MODEL = Path(__file__).parent / "model"
PERSONAS = Path(__file__).parent / "personas"
DATA = Path(__file__).parent / "data"
