"""Next-token cross-entropy against NumPy, in one piece and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from vlp_jax.losses import captioning


def test_targets():
  text = np.array([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 8, 9, 8, 3]])
  labels, weights = captioning.targets(text, np.array([4, 3, 5]))
  np.testing.assert_array_equal(
    labels, [[5, 6, 3, 0], [7, 3, 0, 0], [8, 9, 8, 3]]
  )
  # The end symbol is a target; what follows it is not, nor is the start.
  np.testing.assert_array_equal(
    weights, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
  )
  assert weights.dtype == np.float32


def test_targets_of_an_empty_row_weigh_nothing():
  _, weights = captioning.targets(np.zeros((1, 4), int), np.array([0]))
  assert weights.sum() == 0


def _inputs():
  draw = np.random.default_rng(0)
  hidden = draw.normal(size=(3, 7, 4)).astype(np.float32)
  kernel = draw.normal(size=(4, 11)).astype(np.float32)
  return hidden, kernel, draw.integers(0, 11, (3, 7))


def _numpy(hidden, kernel, labels):
  logits = hidden.astype(np.float64) @ kernel
  nll = np.log(np.exp(logits).sum(-1))
  for place in np.ndindex(labels.shape):
    nll[place] -= logits[place][labels[place]]
  return nll, logits.argmax(-1) == labels


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 10])
def test_cross_entropy(chunk):
  hidden, kernel, labels = _inputs()
  nll, right = captioning.cross_entropy(
    lambda x: x @ kernel, hidden, labels, chunk
  )
  expected, expected_right = _numpy(hidden, kernel, labels)
  assert nll.dtype == np.float32
  np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(right, expected_right)
  assert 0 < right.sum() < right.size


@pytest.mark.parametrize("chunk", [3, 7])
def test_chunks_have_the_same_gradient(chunk):
  hidden, kernel, labels = _inputs()
  weights = np.random.default_rng(1).random(labels.shape).astype(np.float32)

  def loss(hidden, kernel, chunk):
    nll, _ = captioning.cross_entropy(
      lambda x: x @ kernel, hidden, labels, chunk
    )
    return jnp.sum(nll * weights)

  gradient = jax.grad(loss, (0, 1))
  whole = dict(zip("hk", gradient(hidden, kernel, 0), strict=True))
  pieces = dict(zip("hk", gradient(hidden, kernel, chunk), strict=True))
  toys.assert_gradients_close(pieces, whole)
  # And the whole has the gradient that it should: (softmax - label) * weight.
  logits = hidden @ kernel
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = ((p - np.eye(11)[labels]) * weights[..., None]) @ kernel.T
  np.testing.assert_allclose(whole["h"], expected, rtol=1e-4, atol=1e-5)


def test_chunks_need_less_memory():
  """Logits of 32 positions of 4,096 words, or of one position at a time."""
  shape = jax.ShapeDtypeStruct
  specs = shape((8, 32, 4), np.float32), shape((4, 4096), np.float32)
  labels = np.zeros((8, 32), np.int32)

  def size(chunk):
    def loss(hidden, kernel):
      head = lambda x: x @ kernel  # noqa: E731
      return captioning.cross_entropy(head, hidden, labels, chunk)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(*specs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert size(1) * 8 < size(0)
