"""k-means: a codebook of vectors, and the nearest entry of one.

Lloyd's iterations from a k-means++ start (Arthur and Vassilvitskii 2007).
Distances come from one matrix product, |x|^2 - 2 x.c + |c|^2, in full float32
on every device: a code must not depend on a device's shorter product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Where a centroid is put, in every coordinate, that no vector may be nearest
# to. Its square, summed over thousands of coordinates, is a float32 still.
FAR = 1e6


def nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """Finds the nearest centroid of each vector; the first of equals.

  Args:
    x: float `[..., D]`.
    centroids: float32 `[K, D]`.

  Returns:
    int32 `[...]`.
  """
  return jnp.argmin(_scores(x, centroids), axis=-1).astype(jnp.int32)


def distortion(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """Averages the squared distance of vectors `[..., D]` to their nearest."""
  squares = jnp.sum(x * x, axis=-1)
  return jnp.mean(squares + 2 * jnp.min(_scores(x, centroids), axis=-1))


def fit(
  x: np.ndarray,
  num_clusters: int,
  iterations: int = 20,
  *,
  seed: int = 0,
  chunk: int = 4096,
) -> np.ndarray:
  """Fits centroids; equal arguments make equal centroids.

  A cluster that has lost its vectors starts again at the vector that is
  farthest from its centroid. Where the vectors are no more than the clusters,
  equal ones counted once, each is a centroid, in the order in which they
  come, and the clusters that are left over lie at `FAR`: `nearest` never
  names them.

  Args:
    x: float32 `[n, D]`, at least one vector.
    num_clusters: K.
    iterations: how often vectors are assigned and centroids moved.
    seed: of the start.
    chunk: vectors whose distances to all centroids, `[chunk, K]`, are in
      memory at a time. Changes the order of sums, and nothing else.

  Returns:
    float32 `[K, D]`.

  Raises:
    ValueError: if there are no vectors.
  """
  x = np.asarray(x, np.float32)
  if not len(x):
    raise ValueError("k-means needs at least one vector")
  first = {}
  for i, row in enumerate(x):
    first.setdefault(row.tobytes(), i)
  if len(first) <= num_clusters:
    centroids = np.full((num_clusters, x.shape[1]), FAR, np.float32)
    centroids[: len(first)] = x[list(first.values())]
    return centroids
  chunk = min(chunk, len(x))
  padding = -len(x) % chunk
  weights = np.pad(np.ones(len(x), np.float32), (0, padding))
  x = np.pad(x, ((0, padding), (0, 0)))
  key = jax.random.key(seed, impl="threefry2x32")
  start = _spread(key, x, weights, num_clusters)
  return np.asarray(_lloyd(x, weights, start, iterations, chunk))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _scores(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """Half the squared distances `[..., K]`, less half of |x|^2."""
  half = 0.5 * jnp.sum(centroids * centroids, axis=-1)
  return half - _product(x, centroids.T)


@functools.partial(jax.jit, static_argnames="count")
def _spread(
  key: jax.Array, x: jax.Array, weights: jax.Array, count: int
) -> jax.Array:
  """Picks `count` vectors of `x` by k-means++.

  The first is drawn evenly, the others with the probability of their squared
  distance to the nearest one before. Padding has weight 0 and is not drawn.
  """
  squares = jnp.sum(x * x, axis=-1)

  def pick(distance, key):
    # log(0) is minus infinity, which is never drawn.
    at = jax.random.categorical(key, jnp.log(distance))
    to_new = squares - 2 * _product(x, x[at]) + squares[at]
    distance = jnp.minimum(distance, jnp.maximum(to_new, 0) * weights)
    return distance.at[at].set(0), x[at]

  alike = weights * jnp.finfo(jnp.float32).max
  return lax.scan(pick, alike, jax.random.split(key, count))[1]


@functools.partial(jax.jit, static_argnames=("iterations", "chunk"))
def _lloyd(
  x: jax.Array,
  weights: jax.Array,
  centroids: jax.Array,
  iterations: int,
  chunk: int,
) -> jax.Array:
  """Moves centroids `[K, D]` to the means of their vectors, again and again."""
  chunks = x.reshape(-1, chunk, x.shape[1]), weights.reshape(-1, chunk)

  def move(_, centroids):
    def assign(sums, chunk):
      x, weights = chunk
      scores = _scores(x, centroids)
      best = jnp.min(scores, axis=-1)
      # Not a scatter, whose order of sums is a GPU's own choice.
      label = jnp.argmin(scores, axis=-1)
      member = jax.nn.one_hot(label, len(centroids)) * weights[:, None]
      total, count = sums
      sums = total + _product(member.T, x), count + jnp.sum(member, axis=0)
      distance = jnp.sum(x * x, axis=-1) + 2 * best
      return sums, jnp.where(weights > 0, distance, -1)

    zeros = jnp.zeros_like(centroids), jnp.zeros(len(centroids))
    (total, count), distance = lax.scan(assign, zeros, chunks)
    _, farthest = lax.top_k(distance.reshape(-1), len(centroids))
    empty = count == 0
    rank = jnp.cumsum(empty) - 1  # of an empty cluster among such
    means = total / jnp.maximum(count, 1)[:, None]
    return jnp.where(empty[:, None], x[farthest[rank]], means)

  return lax.fori_loop(0, iterations, move, centroids)
