"""The causal text tower."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.attention import KeysValues
from vlp_jax.models.transformer import Transformer
from vlp_jax.ops import masks

POOLS = ("cls", "eot")


class TextTower(nn.Module):
  """CoCa's unimodal text decoder, and with `pool="eot"` CLIP's text encoder.

  Attributes:
    vocab_size: V.
    max_len: the most tokens a caption may have, start and end included.
    transformer: the stack.
    pool: the token that stands for the caption: `cls`, a learned token that
      is appended at the end (CoCa section 3.2), or `eot`, the end symbol.
    legacy_cls_mask: reproduce open_clip's shifted key mask of [CLS], for its
      weights (`masks.causal_with_cls`).
    dtype: of the matrix products.
  """

  vocab_size: int
  max_len: int
  transformer: Transformer
  pool: str = "cls"
  legacy_cls_mask: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    width = self.transformer.width
    self.embedding = nn.Embed(
      self.vocab_size,
      width,
      embedding_init=initializers.normal(0.02),
      dtype=self.dtype,
    )
    init = initializers.normal(0.01)
    self.pos = self.param("pos", init, (self.max_len, width))
    if self.pool == "cls":
      self.cls = self.param("cls", init, (width,))
      # Not a row of `pos`: [CLS] is in the same place however far a caption
      # is padded.
      self.cls_pos = self.param("cls_pos", init, (width,))

  def __call__(
    self, text: jax.Array, text_len: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Encodes captions.

    Args:
      text: int32 `[B, L]`, L at most `max_len`.
      text_len: int32 `[B]`.

    Returns:
      The caption's vector `[B, D]` and its tokens `[B, L, D]`: the residual
      stream, without a norm.
    """
    length = text.shape[1]
    x = self.embedding(text) + self.pos[:length].astype(self.dtype)
    if self.pool == "cls":
      cls = (self.cls + self.cls_pos).astype(x.dtype)
      cls = jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[-1]))
      mask = masks.causal_with_cls(
        text_len, length, legacy=self.legacy_cls_mask
      )
      x = self.transformer(jnp.concatenate([x, cls], axis=1), mask)
      return x[:, -1], x[:, :-1]
    x = self.transformer(x, masks.causal(length))
    # An empty row (padding of the batch) has no last token: take the first.
    last = jnp.maximum(text_len - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], x

  def decode(
    self, token: jax.Array, cache: KeysValues, position: jax.Array
  ) -> tuple[jax.Array, KeysValues]:
    """Encodes one more token, int32 `[B]`, of captions in the making.

    Returns:
      `[B, 1, D]` and the new cache.
    """
    pos = jax.lax.dynamic_slice_in_dim(self.pos, position, 1)
    x = self.embedding(token[:, None]) + pos.astype(self.dtype)
    return self.transformer.decode(x, cache, position)
