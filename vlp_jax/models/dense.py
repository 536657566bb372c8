"""Maps of tokens: flax's dense layer, and maps to heads and back.

All products are those of `ops.linear`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from vlp_jax.ops import linear

Dense = functools.partial(nn.Dense, dot_general=linear.dot_general)


class ToHeads(nn.Module):
  """Maps tokens to heads, or to several sets of heads.

  Parameters are those of flax's `DenseGeneral`: `kernel` `[D, N, H]` and `bias`
  `[N, H]`; of several sets `[D, S, N, H]` and `[S, N, H]`, for which there is a
  product each: slices of a common one would have to be copied.

  Attributes:
    num_heads: N.
    size: H, channels of a head.
    kernel_init: of the kernel, as a matrix.
    sets: S; 0 is one set, which is returned as such.
    dtype: of the matrix products.
  """

  num_heads: int
  size: int
  kernel_init: nn.initializers.Initializer
  sets: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """Maps `[..., D]` to `[..., N, H]`, or to S of these."""
    depth, heads = x.shape[-1], (self.num_heads, self.size)
    outputs = (self.sets, *heads) if self.sets else heads
    kernel, bias = _parameters(self, (depth,), outputs)
    x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)

    def project(kernel, bias):
      y = linear.matmul(x, kernel.reshape(depth, -1)) + bias.reshape(-1)
      return y.reshape(*x.shape[:-1], *heads)

    if not self.sets:
      return project(kernel, bias)
    return tuple(project(kernel[:, i], bias[i]) for i in range(self.sets))


class FromHeads(nn.Module):
  """Maps heads to tokens.

  Parameters are those of flax's `DenseGeneral`: `kernel` `[N, H, D]` and `bias`
  `[D]`.

  Attributes:
    width: D.
    kernel_init: of the kernel, as a matrix.
    dtype: of the matrix products.
  """

  width: int
  kernel_init: nn.initializers.Initializer
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, heads: jax.Array) -> jax.Array:
    """Maps `[..., N, H]` to `[..., D]`."""
    kernel, bias = _parameters(self, heads.shape[-2:], (self.width,))
    heads, kernel, bias = dtypes.promote_dtype(
      heads, kernel, bias, dtype=self.dtype
    )
    x = heads.reshape(*heads.shape[:-2], -1)
    return linear.matmul(x, kernel.reshape(-1, self.width)) + bias


def _parameters(
  module: ToHeads | FromHeads, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Makes a kernel `[*inputs, *outputs]` and a bias `[*outputs]`."""

  def init(key, shape):
    matrix = math.prod(inputs), math.prod(outputs)
    return module.kernel_init(key, matrix, jnp.float32).reshape(shape)

  kernel = module.param("kernel", init, (*inputs, *outputs))
  return kernel, module.param("bias", nn.initializers.zeros, tuple(outputs))
