"""A vision and a text tower, and two streams that attend to each other.

`SCLEncoder` is SCL's arrangement (Ji et al. 2023, "Seeing what you miss"; the
fusion is METER's, Dou et al. 2022). Methods call the pieces; what is trained
on them is written in `methods/`. A step encodes everything once:

  patches = embed(image)                     once for all that follows
  seen, part = see(patches), see(patches, keep)
  tokens = read(texts, text_len)             all versions of a text, as rows
  text, seen = fuse(tokens, text_len, seen)  rows of equal shape together
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.captioner import unit
from vlp_jax.models.co_attention import CoAttention
from vlp_jax.models.dense import Dense
from vlp_jax.models.heads import (
  DeepProjection,
  Temperature,
  VocabularyHead,
  WordHead,
)
from vlp_jax.models.text import BidirectionalText
from vlp_jax.models.transformer import layer_norm
from vlp_jax.models.vision import VisionTower
from vlp_jax.ops import masking


class Seen(NamedTuple):
  """An encoded picture or video, before or after fusion.

  Attributes:
    frames: `[B, F, D]`, one token a frame; a picture is one frame.
    patches: `[B, F K, D]`, frame by frame.
  """

  frames: jax.Array
  patches: jax.Array

  @property
  def whole(self) -> jax.Array:
    """One vector `[B, D]`: the mean of the frame tokens."""
    return jnp.mean(self.frames, axis=1)

  def patches_at(self, places: jax.Array) -> jax.Array:
    """Takes the same places, int32 `[B, K]`, of every frame: `[B, F K, D]`."""
    batch, frames, width = self.frames.shape
    patches = self.patches.reshape(batch, frames, -1, width)
    return masking.take(patches, places).reshape(batch, -1, width)


class SCLEncoder(nn.Module):
  """Two towers, a two-stream fusion encoder, and heads.

  Attributes:
    vision: with [CLS].
    text: the text tower.
    fusion: the two streams; either tower is mapped to its width.
    image_projection: from a picture's frame tokens to the joint space.
    text_projection: from a text's first token to the joint space.
    words: the head for hidden words.
    vocabulary: its matrix, not tied to the embeddings.
    temperature: of the contrastive logits.
  """

  vision: VisionTower
  text: BidirectionalText
  fusion: CoAttention
  image_projection: DeepProjection
  text_projection: DeepProjection
  words: WordHead
  vocabulary: VocabularyHead
  temperature: Temperature

  def setup(self):
    width, init = self.fusion.transformer.width, initializers.normal(0.02)
    dtype = self.fusion.dtype
    self.vision_norm = layer_norm(
      dtype=self.vision.dtype, epsilon=self.vision.transformer.epsilon
    )
    self.image_in = Dense(width, kernel_init=init, dtype=dtype)
    self.text_in = Dense(width, kernel_init=init, dtype=dtype)
    self.matching = Dense(2, kernel_init=init)

  def embed(
    self, image: jax.Array, hidden: jax.Array | None = None
  ) -> jax.Array:
    """Cuts uint8 `[B, H, W, 3]` or `[B, F, H, W, 3]`; see `VisionTower`."""
    return self.vision.embed(image, hidden)

  def see(self, patches: jax.Array, keep: jax.Array | None = None) -> Seen:
    """Encodes pictures or videos alone.

    Args:
      patches: of `embed`.
      keep: int `[B, K]`, the places of patches that are not dropped, the same
        in all frames; None keeps all.

    Returns:
      Their tokens, in the width of the fusion encoder.
    """
    if keep is not None:
      patches = masking.take(patches, keep)
    tokens = self.vision.encode(patches)
    return Seen(*(self.image_in(self.vision_norm(x)) for x in tokens))

  def read(self, text: jax.Array, text_len: jax.Array) -> jax.Array:
    """Encodes texts alone.

    Args:
      text: int32 `[B, L]`.
      text_len: int32 `[B]`.

    Returns:
      `[B, L, D]`, in the width of the fusion encoder.
    """
    return self.text_in(self.text(text, text_len))

  def embed_image(self, seen: Seen) -> jax.Array:
    """Unit embeddings `[B, E]` of what `see` returns."""
    return unit(self.image_projection(seen.whole))

  def embed_text(self, tokens: jax.Array) -> jax.Array:
    """Unit embeddings `[B, E]` of what `read` returns."""
    return unit(self.text_projection(tokens[:, 0]))

  def fuse(
    self, tokens: jax.Array, text_len: jax.Array, seen: Seen
  ) -> tuple[jax.Array, Seen]:
    """Lets texts and pictures attend to each other.

    Args:
      tokens: `[B, L, D]` of `read`.
      text_len: int32 `[B]`.
      seen: of `see`.

    Returns:
      Both, of the shapes that they had.
    """
    image = jnp.concatenate(seen, axis=1)
    tokens, image = self.fusion(tokens, text_len, image)
    count = seen.frames.shape[1]
    return tokens, Seen(image[:, :count], image[:, count:])

  def match_logits(self, tokens: jax.Array, seen: Seen) -> jax.Array:
    """Logits `[B, 2]` of (no match, match), of what `fuse` returns."""
    pooled = self.fusion.pool(tokens[:, 0], seen.whole)
    return self.matching(pooled.astype(jnp.float32))

  def word_logits(self, tokens: jax.Array) -> jax.Array:
    """Logits of hidden words: fused `[..., D]` to float32 `[..., V]`."""
    x, bias = self.words(tokens)
    return self.vocabulary(x) + bias

  def divisor(self) -> jax.Array:
    """The temperature, a scalar."""
    return self.temperature()

  def encode_image(self, image: jax.Array) -> jax.Array:
    """Embeds uint8 pictures or videos: float32 `[B, E]`, unit length."""
    return self.embed_image(self.see(self.embed(image)))

  def encode_text(self, text: jax.Array, text_len: jax.Array) -> jax.Array:
    """Embeds texts `[B, L]`: float32 `[B, E]`, unit length."""
    return self.embed_text(self.read(text, text_len))

  def __call__(self, image, text, text_len) -> None:
    """Touches every parameter, for `init`."""
    seen, tokens = self.see(self.embed(image)), self.read(text, text_len)
    self.embed_image(seen)
    self.embed_text(tokens)
    tokens, seen = self.fuse(tokens, text_len, seen)
    self.match_logits(tokens, seen)
    self.word_logits(tokens)
    self.divisor()
