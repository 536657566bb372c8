"""Flax linen modules: no losses, no config objects, no method names."""
