"""The parts of HTTP that all routes share: access, limits, request log, errors, metrics, health, documentation."""
