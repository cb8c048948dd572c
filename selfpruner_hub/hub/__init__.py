"""Publishing from saved files: the files of a model, its card, its plots, and a Space."""
