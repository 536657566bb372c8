"""Tests of vlp_jax.data.prepare."""
