"""Models: load, run and temporarily patch them; model classes whose layers differ in width."""
