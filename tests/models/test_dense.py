"""Maps to heads and back against flax's general layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests import toys
from vlp_jax.models import dense

INIT = nn.initializers.xavier_uniform()
N, H, D = 3, 4, 10


def _draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _assert_equal(ours, reference, x, stack=lambda y: y):
  """The same initial parameters, to the bit, and the same map."""
  params = toys.jit(ours.init)(jax.random.key(0), x)
  want = toys.jit(reference.init)(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  params = toys.random_like(params)
  got, want = (
    toys.jit(module.apply)(params, x) for module in (ours, reference)
  )
  np.testing.assert_allclose(stack(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("sets", [0, 2])
def test_to_heads(leading, sets):
  x = _draw(*leading, D)
  ours = dense.ToHeads(N, H, INIT, sets=sets)
  if not sets:
    _assert_equal(ours, nn.DenseGeneral((N, H), kernel_init=INIT), x)
    return
  reference = nn.DenseGeneral((sets, N, H), kernel_init=INIT)
  _assert_equal(ours, reference, x, lambda y: np.stack(y, axis=-3))


@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 3, 5)])
def test_from_heads(leading):
  reference = nn.DenseGeneral(D, axis=(-2, -1), kernel_init=INIT)
  _assert_equal(dense.FromHeads(D, INIT), reference, _draw(*leading, N, H))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_in_a_dtype_of_weights_in_float32(dtype):
  for module, shape in (
    (dense.ToHeads(N, H, INIT, dtype=dtype), (2, 5, D)),
    (dense.FromHeads(D, INIT, dtype=dtype), (2, 5, N, H)),
  ):
    y, params = toys.jit(module.init_with_output)(
      jax.random.key(0), _draw(*shape)
    )
    assert y.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
