"""From JSONL to a persona: statistics, scores, selection, certificate.

Knows how a mask is found in a base model, without training. Refuses to know about HTTP, jobs and stores.
"""

from masquerade.pruning.builder import Builder, Progress, Speaker
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scores import SCORES
from masquerade.pruning.scratch import Scratch

__all__ = ["SCORES", "Builder", "Progress", "Recipe", "Scratch", "Speaker"]
