"""Text towers: causal, and bidirectional."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.attention import Dropout, KeysValues
from vlp_jax.models.transformer import Transformer, layer_norm
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
    x = self.transformer(x, masks.Mask(causal=True))
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


class BertEmbeddings(nn.Module):
  """What language models in BERT's manner have before their stack.

  Attributes:
    vocab_size: V.
    max_len: the most tokens that have positions.
    transformer: the stack, post-norm.
    dropout: rate after the embeddings.
    dtype: of the matrix products.
  """

  vocab_size: int
  max_len: int
  transformer: Transformer
  dropout: float = 0.0
  dtype: Any = jnp.float32
  unused_rows = 0  # of the table of positions, at its beginning

  def setup(self):
    width, init = self.transformer.width, initializers.normal(0.02)
    self.embedding = nn.Embed(
      self.vocab_size, width, embedding_init=init, dtype=self.dtype
    )
    rows = self.unused_rows + self.max_len
    self.pos = self.param("pos", init, (rows, width))
    self.norm = layer_norm(dtype=self.dtype, epsilon=self.transformer.epsilon)
    self.drop = Dropout(self.dropout)


class BidirectionalText(BertEmbeddings):
  """RoBERTa (Liu et al. 2019): every token sees all tokens, on both sides.

  Its table of positions begins with two rows that no real token has: the
  first is not used, pads have the second. `max_len` is 512 in RoBERTa.
  """

  unused_rows = 2

  def setup(self):
    super().setup()
    init = initializers.normal(0.02)
    self.type = self.param("type", init, (self.transformer.width,))

  def __call__(self, text: jax.Array, text_len: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      text: int32 `[B, L]`, L at most `max_len`.
      text_len: int32 `[B]`; what follows is padding.

    Returns:
      `[B, L, D]`; what is at pads has no meaning.
    """
    length = text.shape[1]
    real = masks.valid(text_len, length)
    pos = jnp.where(real[..., None], self.pos[2 : 2 + length], self.pos[1])
    x = self.embedding(text) + (pos + self.type).astype(self.dtype)
    return self.transformer(self.drop(self.norm(x)), masks.Mask(text_len))
