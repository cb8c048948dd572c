"""Models: load them, run them, patch them for a while, and the classes whose layers differ."""
