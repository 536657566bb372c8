"""Attention against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops.attention import attend

pytestmark = pytest.mark.usefixtures("strict_ranks")


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_attend():
  b, t, s, n, h = 2, 3, 5, 2, 4
  q, k, v = _draw(b, t, n, h), _draw(b, s, n, h, seed=1), _draw(b, s, n, h)
  mask = np.random.default_rng(2).random((b, t, s)) < 0.6
  mask[..., 0] = True
  out, probabilities = attend(q, k, v, mask)
  assert probabilities.shape == (b, n, t, s)
  for i, j, row in np.ndindex(b, n, t):
    scores = k[i, :, j] @ q[i, row, j] / np.sqrt(h)
    weights = np.exp(scores) * mask[i, row]
    weights /= weights.sum()
    np.testing.assert_allclose(probabilities[i, j, row], weights, rtol=1e-5)
    np.testing.assert_allclose(
      out[i, row, j], weights @ v[i, :, j], rtol=1e-5, atol=1e-6
    )


def test_masks_broadcast_over_rows():
  q, k, v = _draw(2, 3, 1, 4), _draw(2, 5, 1, 4, seed=1), _draw(2, 5, 1, 4)
  mask = np.arange(5) < np.array([[2], [5]])
  full = np.broadcast_to(mask[:, None], (2, 3, 5))
  np.testing.assert_array_equal(
    attend(q, k, v, mask[:, None])[0], attend(q, k, v, full)[0]
  )


def test_nothing_to_attend_to_is_not_nan():
  q, k, v = _draw(1, 2, 1, 4), _draw(1, 3, 1, 4), _draw(1, 3, 1, 4)
  out, _ = attend(q, k, v, np.zeros((1, 2, 3), bool))
  np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(axis=0), rtol=1e-6)


def test_scores_and_softmax_are_float32():
  # In bfloat16, 256 and 257 are the same score.
  q = jnp.array([1.0, 1.0], jnp.bfloat16).reshape(1, 1, 1, 2)
  k = jnp.array([[256, 0], [256, 1]], jnp.bfloat16).reshape(1, 2, 1, 2)
  out, probabilities = attend(q * 2**0.5, k, k)
  assert out.dtype == jnp.bfloat16
  assert probabilities.dtype == jnp.float32
  gap = np.log(probabilities[0, 0, 0, 1] / probabilities[0, 0, 0, 0])
  np.testing.assert_allclose(gap, 1.0, rtol=0.01)
