"""Flax's dense layers, with tokens as the rows of one matrix."""

import functools

from flax import linen as nn

from vlp_jax.ops import linear

Dense = functools.partial(nn.Dense, dot_general=linear.dot_general)
DenseGeneral = functools.partial(
  nn.DenseGeneral, dot_general=linear.dot_general
)
