"""Finds a persona's mask in a base model, without training: statistics, scores, selection, certificate."""

from masquerade.pruning.builder import Builder, BuildResult, RefusedMask
from masquerade.pruning.data import PersonaExamples
from masquerade.pruning.progress import Progress
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scores import SCORES
from masquerade.pruning.scratch import Scratch

__all__ = ["SCORES", "BuildResult", "Builder", "PersonaExamples", "Progress", "Recipe", "RefusedMask", "Scratch"]
