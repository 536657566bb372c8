"""Single-stream encoders: one stack that either modality can go through.

`Stream` continues another tower (a captioner's decoder, an image decoder).
`SingleStream` is SIMLA's and ALBEF's language model, from token ids on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.attention import KeysValues
from vlp_jax.models.text import BertEmbeddings
from vlp_jax.models.transformer import Transformer, layer_norm
from vlp_jax.ops import linear, masks


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
    context_len: jax.Array | None = None,
  ) -> jax.Array:
    """Runs one modality through the stack, given the other.

    Args:
      x: `[B, T, D]`.
      context: `[B, S, D]` of the other modality; None leaves it out.
      causal: whether token t sees only the tokens up to t.
      context_len: int32 `[B]`, the real tokens of a context; None: all.

    Returns:
      `[B, T, D]`, after the final norm.
    """
    mask = masks.Mask(causal=True) if causal else None
    context_mask = None if context_len is None else masks.Mask(context_len)
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


class SingleStream(BertEmbeddings):
  """One BERT with cross-attention, used in three ways (Khan et al. 2022).

  Its weights encode text alone, text given a picture, and a picture given
  text; which of them runs is static. With `text_transformer` text first goes
  through layers of its own, and those with cross-attention continue from
  there: ALBEF's 6 + 6 layers (Li et al. 2021).

  `transformer` has cross-attention; of `max_len` positions patches and [CLS]
  take theirs, too.

  Attributes:
    text_transformer: layers for text alone, or None: then text alone goes
      through `transformer`, without its cross-attention.
  """

  text_transformer: Transformer | None = None

  def embed(self, text: jax.Array) -> jax.Array:
    """Embeds tokens, int32 `[B, L]`: `[B, L, D]`, normed, with positions."""
    return self._place(self.embedding(text))

  def read(self, x: jax.Array, text_len: jax.Array) -> jax.Array:
    """Text alone: `[B, L, D]` of `embed` to `[B, L, D]`."""
    stack = self.text_transformer or self.transformer
    return stack(x, masks.Mask(text_len))

  def project(self, context: jax.Array) -> KeysValues:
    """Keys and values of a context `[B, S, C]`, in every layer."""
    return self.transformer.project(context)

  def text_given_image(
    self,
    x: jax.Array,
    text_len: jax.Array,
    keys_values: KeysValues,
    rows: jax.Array,
  ) -> jax.Array:
    """Text that attends to pictures.

    Args:
      x: `[M, L, D]` of `embed`, or with layers for text alone of `read`.
      text_len: int32 `[M]`.
      keys_values: of `project`, for B pictures.
      rows: int `[G, M / G]`, the picture of each text; see
        `transformer.take_rows`.

    Returns:
      `[M, L, D]`.
    """
    return self.transformer(
      x, masks.Mask(text_len), keys_values=keys_values, rows=rows
    )

  def image_given_text(
    self, patches: jax.Array, x: jax.Array, text_len: jax.Array
  ) -> jax.Array:
    """Pictures that attend to text, through the same weights.

    Args:
      patches: the vision tower's output `[B, S, D]`; S at most `max_len`. It
        gets the positions of text, as if it were words.
      x: `[B, L, D]` of `embed`.
      text_len: int32 `[B]`.

    Returns:
      `[B, S, D]`.
    """
    mask = masks.Mask(text_len)
    return self.transformer(self._place(patches), None, x, mask)

  def token_logits(self, x: jax.Array) -> jax.Array:
    """Maps `[..., D]` to float32 `[..., V]`: products with word embeddings."""
    table = self.embedding.embedding.astype(self.dtype)
    return linear.matmul(
      x.astype(self.dtype), table.T, preferred_element_type=jnp.float32
    )

  def _place(self, x: jax.Array) -> jax.Array:
    return self.drop(self.norm(x + self.pos[: x.shape[1]].astype(x.dtype)))
