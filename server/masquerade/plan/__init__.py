"""What a model takes and what fits beside it, from its header alone."""
