"""Weights travel, rows stay."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax import hlo, roofline, sharding
from vlp_jax.ops import layout, platforms


def _mesh():
  return sharding.make_mesh((2, 4, 1), jax.devices()[:8])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_step_sends_weights_and_no_activations(monkeypatch, platform):
  """Without `keep_rows` it is 16 times as much, most of it activations."""
  monkeypatch.setattr(sharding, "MIN_SIZE", 2**8)
  config = config_lib.load(
    "configs/clip.py:debug", ["batch_size=64", "optimizer.name=adamw"]
  )
  with platforms.compiling_for(platform):
    step, state, batch = roofline.abstract_step(config, _mesh())
    compiled = step.lower(state, batch).compile(toys.compiler_options())
  work = list(hlo.Module(compiled.as_text()).work())
  sent = sum(w.times * w.collective.sent for w in work if w.collective)
  weights = 4 * sum(x.size for x in jax.tree.leaves(state.params))
  # Gathered twice, forward and backward, and gradients summed up: 2 or so.
  assert weights < sent < 4 * weights


@pytest.mark.parametrize("rows", [1, 12])
def test_rows_of_no_batch_are_left_alone(rows):
  x = jnp.ones((rows, 3))
  with layout.batch(NamedSharding(_mesh(), sharding.BATCH)):
    assert "sharding_constraint" not in str(jax.make_jaxpr(layout.keep_rows)(x))
    assert "sharding_constraint" in str(
      jax.make_jaxpr(layout.keep_rows)(jnp.ones((8, 3)))
    )
  assert layout.keep_rows(x) is x
