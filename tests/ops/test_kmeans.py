"""k-means against a small NumPy Lloyd, and on clusters that are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import kmeans


def _vectors(count=300, width=6, seed=0):
  draw = np.random.default_rng(seed)
  return draw.normal(size=(count, width)).astype(np.float32)


def _squares(x, centroids):
  """Squared distances in float64, `[n, K]`."""
  x, centroids = np.float64(x), np.float64(centroids)
  return ((x[:, None] - centroids) ** 2).sum(-1)


def _lloyd(x, centroids, iterations):
  for _ in range(iterations):
    squares = _squares(x, centroids)
    label, distance = squares.argmin(1), squares.min(1)
    farthest = iter(np.argsort(-distance, kind="stable"))
    centroids = np.array(
      [
        x[label == k].mean(0) if (label == k).any() else x[next(farthest)]
        for k in range(len(centroids))
      ]
    )
  return centroids


def _run_lloyd(x, start, iterations, chunk=None):
  weights = np.ones(len(x), np.float32)
  return kmeans._lloyd(x, weights, start, iterations, chunk or len(x))


def test_nearest():
  x, centroids = _vectors(40).reshape(4, 10, 6), _vectors(7, seed=1)
  codes = jax.jit(kmeans.nearest)(x, centroids)
  assert codes.dtype == jnp.int32 and codes.shape == (4, 10)
  expected = _squares(x.reshape(40, 6), centroids)
  np.testing.assert_array_equal(codes.ravel(), expected.argmin(1))
  np.testing.assert_allclose(
    kmeans.distortion(x, centroids), expected.min(1).mean(), rtol=1e-5
  )


def test_nearest_of_equals_is_the_first():
  centroids = _vectors(3)[[1, 0, 0, 2]]
  np.testing.assert_array_equal(kmeans.nearest(_vectors(1), centroids), [1])


@pytest.mark.parametrize("iterations", [1, 5])
def test_lloyd_is_as_in_numpy(iterations):
  x = _vectors()
  centroids = _run_lloyd(x, x[:8], iterations)
  expected = _lloyd(x, x[:8], iterations)
  np.testing.assert_allclose(centroids, expected, rtol=1e-5, atol=1e-6)


def test_empty_clusters_start_again_at_the_farthest_vectors():
  x = _vectors()
  start = np.concatenate([x[:4], np.full((2, 6), 100), x[4:6]])
  start = start.astype(np.float32)
  centroids = np.asarray(_run_lloyd(x, start, 1))
  distance = _squares(x, start).min(1)
  np.testing.assert_array_equal(centroids[4:6], x[np.argsort(-distance)[:2]])
  expected = _lloyd(x, start, 3)
  centroids = _run_lloyd(x, start, 3)
  np.testing.assert_allclose(centroids, expected, rtol=1e-5, atol=1e-6)
  assert np.bincount(kmeans.nearest(x, centroids), minlength=8).all()


def test_the_start_is_spread_over_vectors_and_leaves_padding_out():
  """Two in a thousand lie apart; drawn evenly they would hardly ever come."""
  x = 0.01 * _vectors(1000)
  x[-2:] += [[9], [-9]]
  x = np.pad(x, ((0, 24), (0, 0)), constant_values=50).astype(np.float32)
  weights = (np.arange(1024) < 1000).astype(np.float32)
  first = set()
  for seed in range(5):
    start = np.asarray(kmeans._spread(jax.random.key(seed), x, weights, 3))
    assert {*start.mean(1).round(-1)} == {-10, 0, 10}
    first.add(start[0].tobytes())
  assert len(first) > 1


def test_planted_clusters_are_found():
  draw = np.random.default_rng(0)
  centres = draw.normal(size=(12, 6)) * 10
  label = draw.integers(0, 12, 600)
  x = centres[label] + 0.1 * draw.normal(size=(600, 6))
  centroids = kmeans.fit(x.astype(np.float32), 12, 10)
  squares = _squares(centres, centroids)
  assert sorted(squares.argmin(1)) == list(range(12))
  assert squares.min(1).max() < 0.01  # a mean of 50: 6 * 0.1^2 / 50
  codes = np.asarray(kmeans.nearest(x, centroids))
  assert len({*zip(label.tolist(), codes.tolist(), strict=True)}) == 12


def test_distortion_falls():
  x = _vectors()
  values = [kmeans.distortion(x, kmeans.fit(x, 16, i)) for i in range(6)]
  assert all(b < a for a, b in itertools.pairwise(values)), values


def test_equal_arguments_make_equal_centroids():
  x = _vectors()
  first = kmeans.fit(x, 16, 5)
  assert first.dtype == np.float32 and first.shape == (16, 6)
  np.testing.assert_array_equal(kmeans.fit(x, 16, 5), first)
  assert np.abs(kmeans.fit(x, 16, 5, seed=1) - first).max() > 0.1


@pytest.mark.parametrize("chunk", [1, 7, 100, 4096])
def test_chunks_change_nothing(chunk):
  x = _vectors()
  centroids = kmeans.fit(x, 16, 5, chunk=chunk)
  whole = kmeans.fit(x, 16, 5, chunk=300)
  np.testing.assert_allclose(centroids, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_no_more_vectors_than_clusters(count):
  """Each is a centroid, copies counted once; the other codes never occur."""
  distinct = _vectors(count)
  x = distinct[np.r_[np.arange(count), np.zeros(20, int)]]
  centroids = kmeans.fit(x, 8)
  np.testing.assert_array_equal(centroids[:count], distinct)
  assert (centroids[count:] == kmeans.FAR).all()
  others = 100 * _vectors(50, seed=1)
  assert np.asarray(kmeans.nearest(others, centroids)).max() < count
  np.testing.assert_array_equal(
    kmeans.nearest(distinct, centroids), np.arange(count)
  )


def test_no_vectors():
  with pytest.raises(ValueError, match="at least one"):
    kmeans.fit(np.zeros((0, 6)), 8)
