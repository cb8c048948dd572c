"""Mixtures of experts: where their experts and routers are, and what these compute."""
