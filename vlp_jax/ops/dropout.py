"""Dropout as a value, for what may drop by other means than XLA's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drop(NamedTuple):
  """Dropout of an array (Srivastava et al. 2014).

  Attributes:
    rate: the share that is dropped.
    key: what decides.
  """

  rate: float
  key: jax.Array

  def __call__(self, x: jax.Array) -> jax.Array:
    """Keeps each number with probability 1 - rate, scaled by its inverse.

    Args:
      x: of any shape.

    Returns:
      The same shape and dtype.
    """
    keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
    return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))

  def split(self) -> tuple["Drop", "Drop"]:
    """Returns two that are independent."""
    return tuple(self._replace(key=key) for key in jax.random.split(self.key))
