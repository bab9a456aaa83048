"""From JSONL to a persona: statistics, scores, selection, certificate.

Knows how a mask is found in a base model, without training. Refuses to know about HTTP, jobs and stores.
"""

from masquerade.build.builder import Builder, Progress, Speaker
from masquerade.build.recipe import Recipe
from masquerade.build.scores import SCORES
from masquerade.build.scratch import Scratch

__all__ = ["SCORES", "Builder", "Progress", "Recipe", "Scratch", "Speaker"]
