"""Requests below HTTP: resolving personas, builds as jobs, the bridge from the engine to the event loop."""
