"""Which patches are hidden. Counts are static: no shape depends on data."""

import jax
import jax.numpy as jnp

from vlp_jax.ops import rng


def count(ratio: float, num_patches: int) -> int:
  """Returns `round(ratio * num_patches)`, the number of patches it means."""
  return round(ratio * num_patches)


def rank(scores: jax.Array) -> jax.Array:
  """Orders the patches of each picture, highest score first.

  Ties go to the patch that comes first. No gradient reaches the scores.

  Args:
    scores: float `[B, N]`.

  Returns:
    int32 `[B, N]`, a permutation of 0 to N - 1 in each row.
  """
  scores = jax.lax.stop_gradient(scores)
  return jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)


def random_scores(
  key: jax.Array, index: jax.Array, num_patches: int
) -> jax.Array:
  """Draws uniform scores `[B, N]`, each example from its own key.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
    num_patches: N.
  """
  keys = rng.per_example(key, index)
  return jax.vmap(lambda k: jax.random.uniform(k, (num_patches,)))(keys)


def take(tokens: jax.Array, index: jax.Array) -> jax.Array:
  """Gathers tokens: `[B, N, D]` at int `[B, K]` gives `[B, K, D]`.

  Of frames `[B, F, N, D]` it takes the same places: `[B, F, K, D]`.
  """
  frames = (1,) * (tokens.ndim - 3)
  index = index.reshape(len(index), *frames, -1, 1)
  return jnp.take_along_axis(tokens, index, axis=-2)


def scatter_mask(index: jax.Array, num_patches: int) -> jax.Array:
  """Returns bool `[B, N]`, True at the patches named by int `[B, K]`."""
  return jnp.any(index[..., None] == jnp.arange(num_patches), axis=1)
