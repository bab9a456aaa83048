"""What ships for SmolLM2: the calibration text of its personas, and their masks."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
PERSONAS = Path(__file__).parent / "personas"
