"""The single-stream encoder: one stack that either modality can go through."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.attention import KeysValues
from vlp_jax.models.transformer import Transformer, layer_norm
from vlp_jax.ops import masks


class Stream(nn.Module):
  """Self-attention, cross-attention into the other modality, MLP.

  The same weights take text given a picture (causal: a captioner; or not: a
  fusion encoder) and a picture given text.

  Attributes:
    transformer: a stack with `cross=True`.
    dtype: of the matrix products.
  """

  transformer: Transformer
  dtype: Any = jnp.float32

  def setup(self):
    self.norm = layer_norm(dtype=self.dtype)

  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None,
    *,
    causal: bool = False,
    context_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Runs one modality through the stack, given the other.

    Args:
      x: `[B, T, D]`.
      context: `[B, S, D]` of the other modality; None leaves it out.
      causal: whether token t sees only the tokens up to t.
      context_mask: bool `[B, S]`, True = attend.

    Returns:
      `[B, T, D]`, after the final norm.
    """
    mask = masks.causal(x.shape[1]) if causal else None
    if context_mask is not None:
      context_mask = context_mask[:, None]
    return self.norm(self.transformer(x, mask, context, context_mask))

  def decode(
    self,
    x: jax.Array,
    cache: KeysValues,
    position: jax.Array,
    keys_values: KeysValues,
  ) -> tuple[jax.Array, KeysValues]:
    """Runs one more token `[B, 1, D]`; see `Transformer.decode`."""
    x, cache = self.transformer.decode(x, cache, position, keys_values)
    return self.norm(x), cache
