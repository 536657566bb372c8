"""Work on some rows at a time: the same results, of less at a time."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests import toys
from vlp_jax import sharding
from vlp_jax.losses import contrastive
from vlp_jax.ops import rows as rows_lib
from vlp_jax.ops.rows import Rows


def _batch_sharding(*shape):
  mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
  return NamedSharding(mesh, sharding.BATCH)


@pytest.mark.parametrize("shape", [None, (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("chunk", [0, 1, 2, 4, 5, 24])
def test_every_row_once_and_in_its_place(chunk, shape):
  split = _batch_sharding(*shape) if shape else None
  devices = shape[0] * shape[1] if shape else 1
  assert rows_lib.devices(split) == devices
  x = np.arange(48.0, dtype=np.float32).reshape(24, 2)
  sizes = set()

  def function(part):
    sizes.add(part["x"].shape[0])
    return part["x"] ** 2, part["x"].sum(axis=1)

  square, total = jax.jit(
    lambda x: rows_lib.map_rows(function, {"x": x}, Rows(chunk, split))
  )(x)
  np.testing.assert_array_equal(square, x**2)
  np.testing.assert_array_equal(total, x.sum(axis=1))
  (size,) = sizes
  # The largest part of a device's rows that is small enough.
  mine = 24 // devices
  parts = [k for k in range(1, mine + 1) if mine % k == 0 and k <= chunk]
  assert size == devices * (max(parts) if chunk and chunk < mine else mine)


BATCH, WIDTH, CHUNK = 128, 24, 4


def _loss(chunk, split=None):
  ids = jnp.arange(BATCH) // 2  # pairs of captions of one picture

  def loss(image, text):
    rows = Rows(chunk, split)
    loss, right = contrastive.softmax(image, text, 8.0, ids, rows=rows)
    loss += contrastive.sigmoid(image, text, 8.0, -3.0, ids, rows)
    return jnp.sum(loss), right

  return jax.value_and_grad(loss, (0, 1), has_aux=True)


def _compiled(chunk):
  split = _batch_sharding(4, 2, 1)
  x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32, sharding=split)
  return (
    jax.jit(_loss(chunk, split)).lower(x, x).compile(toys.compiler_options())
  )


def test_devices_hold_a_few_rows_of_logits():
  """Never more than chunk x batch, forward or backward; and it is the same."""
  image, text = np.random.default_rng(0).normal(size=(2, BATCH, WIDTH))
  image, text = (x.astype(np.float32) / 4 for x in (image, text))
  (whole, right), gradients = jax.jit(_loss(0))(image, text)
  compiled = _compiled(CHUNK)
  put = jax.device_put((image, text), _batch_sharding(4, 2, 1))
  (loss, right_too), gradients_too = compiled(*put)
  np.testing.assert_allclose(loss, whole, rtol=1e-6)
  toys.assert_trees_equal(right_too, right)
  toys.assert_gradients_close(
    dict(enumerate(gradients_too)), dict(enumerate(gradients))
  )

  def largest(compiled):
    """Numbers of the largest array of logits: as long as the batch one way."""
    found = re.findall(r"f32\[(\d+(?:,\d+)+)\]", compiled.as_text())
    shapes = [tuple(map(int, dims.split(","))) for dims in found]
    return max(np.prod(s) for s in shapes if BATCH in s and WIDTH not in s)

  assert largest(compiled) <= CHUNK * BATCH
  # So it would show: a device's rows without chunks are four times as many.
  assert largest(_compiled(0)) == BATCH // 8 * BATCH
