"""Publishing from saved files: what is published, its card and pictures, and a Space."""
