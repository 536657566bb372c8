"""Two streams that attend to each other (METER, Dou et al. 2022, co-attention).

Text and pictures have layers of their own, with weights of their own. Each
layer attends to itself, then to the other stream, then there is an MLP. Both
read what the layer below left of the other: neither stream is ahead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.dense import Dense
from vlp_jax.models.transformer import (
  Block,
  Transformer,
  block_fields,
  lift,
)
from vlp_jax.ops import masks

Streams = tuple[jax.Array, jax.Array]


class CoBlock(nn.Module):
  """A block for text and one for pictures, each given the other's input.

  Attributes:
    fields: of either `Block`.
  """

  fields: dict[str, Any]

  def setup(self):
    self.text = Block(**self.fields)
    self.image = Block(**self.fields)

  def __call__(
    self, streams: Streams, text_mask: masks.Mask
  ) -> tuple[Streams, None]:
    """Maps text `[B, L, D]` and pictures `[B, S, D]`; for `lift`."""
    text, image = streams
    rest = (None,) * 4
    new_text, _ = self.text(text, text_mask, image, None, *rest)
    new_image, _ = self.image(image, None, text, text_mask, *rest)
    return (new_text, new_image), None


class CoAttention(nn.Module):
  """Layers of two streams, what tells these apart, and their poolers.

  Attributes:
    transformer: how either stream's layers are made: post-norm, with
      cross-attention. It has no parameters of its own.
    dtype: of the matrix products.
  """

  transformer: Transformer
  dtype: Any = jnp.float32

  def setup(self):
    init = initializers.normal(0.02)
    width = self.transformer.width
    self.types = self.param("types", init, (2, width))
    stack = lift(CoBlock, self.transformer, __call__=(nn.broadcast,))
    self.layers = stack(block_fields(self.transformer))
    self.text_pool = Dense(width, kernel_init=init, dtype=self.dtype)
    self.image_pool = Dense(width, kernel_init=init, dtype=self.dtype)

  def __call__(
    self, text: jax.Array, text_len: jax.Array, image: jax.Array
  ) -> Streams:
    """Lets the two attend to each other.

    Args:
      text: `[B, L, D]`.
      text_len: int32 `[B]`; nothing attends to what follows.
      image: `[B, S, D]`, all of it real.

    Returns:
      Text and pictures, of the shapes that they had.
    """
    types = self.types.astype(self.dtype)
    mask = masks.Mask(text_len)
    return self.layers((text + types[0], image + types[1]), mask)[0]

  def pool(self, text: jax.Array, image: jax.Array) -> jax.Array:
    """Joins fused vectors of a pair, `[B, D]` each: `[B, 2 D]`, text first."""
    pooled = self.text_pool(text), self.image_pool(image)
    return jnp.tanh(jnp.concatenate(pooled, axis=-1))
