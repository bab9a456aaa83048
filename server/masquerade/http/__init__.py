"""What every request passes, whatever it asks: access, limits, the request log, errors, metrics, health."""
