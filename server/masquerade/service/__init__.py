"""Everything that is served, without HTTP: names, builds, the bridge from the engine to the event loop."""
