"""Losses with a teacher, matching and keywords against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.losses import distillation, keywords, matching
from vlp_jax.ops.rows import Rows


@pytest.fixture
def rng():
  """Draws the same numbers in every test, whatever ran before."""
  return np.random.default_rng(0)


def softmax(x, axis=-1):
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def unit(rng, *shape):
  x = rng.standard_normal(shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_contrastive(alpha, chunk, rng):
  query, keys, teacher = (unit(rng, n, 6) for n in (4, 9, 4))
  # Of one picture are queries 0 and 1, and a key of the queue.
  ids = np.array([3, 3, 1, 2, 8, 9, 7, 3, 6], np.int32)
  allowed = np.ones((4, 9), bool)
  allowed[0, [1, 7]] = allowed[1, [0, 7]] = False
  loss, right = distillation.contrastive(
    query,
    keys,
    teacher,
    jnp.float32(0.1),
    alpha,
    ids[:4],
    ids,
    Rows(chunk),
  )
  logits, soft = query @ keys.T / 0.1, teacher @ keys.T / 0.1
  for i in range(4):
    columns = np.flatnonzero(allowed[i])
    p = softmax(logits[i, columns].astype(np.float64))
    q = alpha * softmax(soft[i, columns]) + (1 - alpha) * (columns == i)
    np.testing.assert_allclose(loss[i], -(q * np.log(p)).sum(), rtol=2e-5)
    assert right[i] == (columns[p.argmax()] == i)


def test_contrast_reaches_the_query_alone(rng):
  query, keys, teacher = (unit(rng, n, 6) for n in (4, 9, 4))

  def loss(*arrays):
    args = jnp.float32(0.1), 0.4, jnp.arange(4), jnp.arange(9)
    return distillation.contrastive(*arrays, *args)[0].sum()

  gradients = jax.grad(loss, (0, 1, 2))(query, keys, teacher)
  assert np.abs(gradients[0]).max() > 0
  assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize("axis", [-1, 1])
def test_cross_entropy(axis, rng):
  logits, teacher = rng.standard_normal((2, 2, 3, 7)).astype(np.float32)
  labels = rng.integers(0, 7, (2, 3))
  loss, right = distillation.cross_entropy(
    logits, labels, teacher, 0.3, axis=axis
  )
  hard = -np.log(np.take_along_axis(softmax(logits), labels[..., None], -1))
  soft = -(softmax(teacher) * np.log(softmax(logits, axis))).sum(-1)
  np.testing.assert_allclose(loss, 0.7 * hard[..., 0] + 0.3 * soft, rtol=1e-5)
  np.testing.assert_array_equal(right, logits.argmax(-1) == labels)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_hard_negatives_follow_their_softmax(scale):
  """Also where a temperature of 0.001 makes every other weight zero."""
  similarity = scale * np.array([[9, 0.5, 0.1, 0], [0, 9, 0, 0]], np.float32)
  similarity = np.concatenate([similarity, similarity])
  admissible = ~np.eye(4, dtype=bool)
  admissible[1] = False
  admissible[3, 2] = False
  keys = jax.random.split(jax.random.key(0), 4000)
  draw = jax.vmap(
    lambda key: matching.hard_negatives(
      similarity, admissible, jax.random.gumbel(key, (4, 4))
    )
  )
  index, exists = map(np.asarray, draw(keys))
  np.testing.assert_array_equal(exists, [[1, 0, 1, 1]] * 4000)
  for row in (0, 2, 3):
    share = np.bincount(index[:, row], minlength=4) / 4000
    weights = softmax(np.where(admissible[row], similarity[row], -np.inf))
    np.testing.assert_allclose(share, weights, atol=0.03)
    assert share[~admissible[row]].sum() == 0


@pytest.mark.parametrize("same_image", [True, False])
def test_admissible_negatives(same_image):
  ids = np.array([[3, 1, 3, 2], [5, 5, 5, 5], [0, 1, 2, 3]])
  expected = np.ones((3, 4, 4), bool)
  for group, i, j in np.ndindex(expected.shape):
    same = same_image and ids[group, i] == ids[group, j]
    expected[group, i, j] = i != j and not same
  found = matching.admissible(jnp.asarray(ids), same_image)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, expected)


def test_hard_negatives_without_noise_are_the_most_similar(rng):
  similarity = rng.standard_normal((2, 3, 3)).astype(np.float32)
  admissible = np.broadcast_to(~np.eye(3, dtype=bool), (2, 3, 3))
  index, _ = matching.hard_negatives(
    similarity, admissible, np.zeros_like(similarity)
  )
  expected = np.where(admissible, similarity, -np.inf).argmax(-1)
  np.testing.assert_array_equal(index, expected)


def test_match_loss(rng):
  logits = rng.standard_normal((5, 2)).astype(np.float32)
  match = np.array([1, 0, 0, 1, 0])
  expected = -np.log(softmax(logits)[np.arange(5), match])
  np.testing.assert_allclose(
    matching.match_loss(logits, match), expected, rtol=1e-5
  )


def test_votes():
  attention = np.zeros((1, 2, 7), np.float32)
  attention[0, 0] = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]  # a tie
  attention[0, 1] = [0.5, 0.0, 0.0, 0.3, 0.1, 0.05, 0.05]
  everything = keywords.votes(attention, None)
  np.testing.assert_array_equal(everything, [[2, 1, 1, 2, 1, 1, 0]])
  eligible = np.array([[False, True, True, True, False, True, False]])
  some = keywords.votes(attention, eligible)
  np.testing.assert_array_equal(some, [[0, 2, 2, 2, 0, 2, 0]])
  few = keywords.votes(attention, np.arange(7)[None] == 3)
  np.testing.assert_array_equal(few, [[0, 0, 0, 2, 0, 0, 0]])


def test_choose_and_multi_hot():
  counts = np.array([[0, 3, 1, 3, 0], [0, 0, 2, 0, 0]], np.int32)
  places, counted = keywords.choose(counts, 3)
  np.testing.assert_array_equal(places[0], [1, 3, 2])
  np.testing.assert_array_equal(counted, [[True] * 3, [True, False, False]])
  assert places[1, 0] == 2
  ids = np.array([[4, 4, 2], [1, 0, 0]])
  labels = keywords.multi_hot(ids, counted, 6)
  np.testing.assert_array_equal(
    labels, [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
  )


def test_keyword_loss(rng):
  logits, teacher = rng.standard_normal((2, 3, 8)).astype(np.float32)
  labels = (rng.random((3, 8)) < 0.3).astype(np.float32)

  def bce(p, target):
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean(-1)

  p, soft = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-teacher))
  expected = 0.6 * bce(p, labels) + 0.4 * bce(p, soft)
  loss = keywords.keyword_loss(logits, labels, teacher, 0.4)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
