"""Products on rows against products on all axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vlp_jax.ops import linear, platforms


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("leading", [(), (3,), (3, 5), (2, 3, 5)])
def test_matmul(leading, platform):
  x, kernel = _draw(*leading, 4), _draw(4, 6, seed=1)
  with platforms.compiling_for(platform):
    got = linear.matmul(x, kernel)
  np.testing.assert_allclose(got, np.matmul(x, kernel), rtol=1e-5, atol=1e-5)


def test_gradient_makes_no_transposed_copy():
  """What it is for: every product is one of matrices as they lie."""

  def count(product):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(product(x, kernel)))

    gradient = jax.jit(jax.grad(loss, argnums=1))
    lowered = gradient.lower(_draw(8, 16, 12), _draw(12, 20))
    text = lowered.compile().as_text()
    return sum(f"f32[{n},8,16]" in text for n in (12, 20))

  assert count(linear.matmul) == 0
  assert count(jnp.matmul) > 0  # else there is nothing to avoid any more


@pytest.mark.parametrize(
  ("leading", "made"), [((8, 16), (8, 16, 20)), ((4, 2, 16), (8, 16, 20))]
)
def test_tokens_keep_their_axis_on_tpus(leading, made):
  with platforms.compiling_for("tpu"):
    program = jax.make_jaxpr(linear.matmul)(_draw(*leading, 12), _draw(12, 20))
  (product,) = (x for x in program.eqns if str(x.primitive) == "dot_general")
  assert product.outvars[0].aval.shape == made


def test_matmul_keeps_options():
  x, kernel = (_draw(3, 4).astype(jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16))
  product = linear.matmul(x, kernel, preferred_element_type=jnp.float32)
  assert product.dtype == jnp.float32
  np.testing.assert_array_equal(
    product,
    lax.dot(x, kernel, preferred_element_type=jnp.float32),
  )


def test_axes_in_another_order_are_refused():
  with pytest.raises(AssertionError):
    linear.dot_general(_draw(3, 4), _draw(3, 2), (((0,), (0,)), ((), ())))
