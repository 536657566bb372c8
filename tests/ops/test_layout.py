"""Weights travel, rows stay."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax import hlo, optim, sharding, train_state, train_step
from vlp_jax.methods import base
from vlp_jax.ops import layout


def _mesh():
  return sharding.make_mesh((2, 4, 1), jax.devices()[:8])


def test_a_step_sends_weights_and_no_activations(monkeypatch):
  """Without `keep_rows` it is 16 times as much, most of it activations."""
  monkeypatch.setattr(sharding, "MIN_SIZE", 2**8)
  config = config_lib.load(
    "configs/clip.py:debug", ["batch_size=64", "optimizer.name=adamw"]
  )
  method, mesh = base.get("clip", config), _mesh()
  optimizer, _ = optim.make_optimizer(config, 100, 10)
  state = jax.eval_shape(
    lambda: train_state.of_config(config, method, optimizer)
  )
  state = sharding.with_shardings(state, mesh)
  rows = NamedSharding(mesh, sharding.BATCH)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in train_state.batch_spec(config).items()
  }
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.jit_step(config, method, optimizer, mesh, shardings)
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
