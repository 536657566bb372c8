"""Matrix products of tokens with weights."""

import jax
from jax import lax

from vlp_jax.ops import layout, platforms


def matmul(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
  """Maps tokens `[..., D]` by a kernel `[D, E]` to `[..., E]`, on rows.

  All leading axes of `x` become one. The result is the same. What differs is
  the gradient of the kernel: it sums over the leading axes, and over one axis
  it is a plain matrix product, where for several XLA first writes a transposed
  copy of `x` (on CPUs this takes longer than the product). On TPUs the last one
  stays by itself: they lay the last two axes of an array out in tiles, and to
  make one axis of 256 x 257 tokens is to move them all.

  The rows stay on their devices.

  Args:
    x: tokens.
    kernel: the weights.
    **options: of `lax.dot_general`.
  """
  leading = x.shape[:-1]
  apart = len(leading) > 1 and platforms.platform() == "tpu"
  x = layout.keep_rows(x.reshape(-1, *x.shape[len(leading) - apart :]))
  dimensions = (((x.ndim - 1,), (0,)), ((), ()))
  y = layout.keep_rows(lax.dot_general(x, kernel, dimensions, **options))
  return y.reshape(*leading, -1)


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers, **options
) -> jax.Array:
  """`matmul`, for layers that call `lax.dot_general` for it."""
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
  return matmul(x, kernel, **options)
