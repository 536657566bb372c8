"""Which patches are hidden: exact counts, rankings, gathering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import masking


@pytest.mark.parametrize(
  "ratio, patches, expected",
  [(0.5, 64, 32), (0.5, 9, 4), (0.25, 196, 49), (0.75, 9, 7), (0, 9, 0)],
)
def test_count(ratio, patches, expected):
  assert masking.count(ratio, patches) == expected


def test_rank_is_highest_first_and_stable():
  scores = np.array([[0.1, 0.9, 0.1, 0.5], [2, 2, 2, 2], [-1, -np.inf, 3, 0]])
  order = masking.rank(scores.astype(np.float32))
  assert order.dtype == np.int32
  np.testing.assert_array_equal(
    order, [[1, 3, 0, 2], [0, 1, 2, 3], [2, 3, 0, 1]]
  )


def test_rank_is_a_permutation():
  scores = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
  order = masking.rank(scores)
  for row, score in zip(order, scores, strict=True):
    assert sorted(row.tolist()) == list(range(33))
    assert (np.diff(score[row]) <= 0).all()


def test_random_scores_belong_to_their_example():
  key, index = jax.random.key(3), np.arange(6, dtype=np.int32)
  scores = masking.random_scores(key, index, 50)
  assert scores.shape == (6, 50)
  assert len(np.unique(scores)) == 300  # no example repeats another
  some = np.array([4, 1], np.int32)
  np.testing.assert_array_equal(
    masking.random_scores(key, some, 50), scores[some]
  )
  other = masking.random_scores(jax.random.key(4), index, 50)
  assert np.abs(other - scores).min() > 0


def test_random_scores_are_uniform():
  scores = masking.random_scores(jax.random.key(0), np.arange(100), 100)
  assert scores.min() >= 0 and scores.max() < 1
  # Standard error of the mean of 10,000 uniform numbers: 0.0029.
  np.testing.assert_allclose(scores.mean(), 0.5, atol=4 * 0.0029)


def test_take_and_scatter_mask():
  tokens = np.arange(2 * 4 * 3).reshape(2, 4, 3)
  index = np.array([[2, 0], [3, 1]])
  expected = [[tokens[0, 2], tokens[0, 0]], [tokens[1, 3], tokens[1, 1]]]
  np.testing.assert_array_equal(
    masking.take(jnp.array(tokens), index), expected
  )
  np.testing.assert_array_equal(
    masking.scatter_mask(index, 4),
    [[True, False, True, False], [False, True, False, True]],
  )
  nothing = masking.scatter_mask(index[:, :0], 4)
  np.testing.assert_array_equal(nothing, np.zeros((2, 4), bool))


def test_take_takes_the_same_places_of_all_frames():
  frames = np.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3)
  index = np.array([[2, 0], [3, 1]])
  taken = masking.take(jnp.array(frames), index)
  assert taken.shape == (2, 5, 2, 3)
  for i, f in np.ndindex(2, 5):
    np.testing.assert_array_equal(taken[i, f], frames[i, f, index[i]])
