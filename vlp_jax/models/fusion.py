"""A vision tower, and a language model that looks at what it saw.

`FusionEncoder` is ALBEF's arrangement and, with heads for hidden patches and
for keywords, SIMLA's. Methods call the pieces; what is trained on them is
written in `methods/`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.attention import KeysValues
from vlp_jax.models.captioner import unit
from vlp_jax.models.heads import Projection, Temperature, WordHead
from vlp_jax.models.stream import SingleStream
from vlp_jax.models.transformer import layer_norm
from vlp_jax.models.vision import VisionTower


class FusionEncoder(nn.Module):
  """A vision tower, a single-stream encoder, and a joint space.

  Attributes:
    vision: with [CLS]; with a mask token where patches are hidden.
    stream: the language model.
    image_projection: from the picture's [CLS] to the joint space.
    text_projection: from the caption's first token to the joint space.
    matching: from a pair's first token to the logits of (no match, match).
    words: the head for hidden words.
    temperature: of the contrastive logits.
  """

  vision: VisionTower
  stream: SingleStream
  image_projection: Projection
  text_projection: Projection
  matching: Projection
  words: WordHead
  temperature: Temperature

  def setup(self):
    self.vision_norm = layer_norm(
      dtype=self.vision.dtype, epsilon=self.vision.transformer.epsilon
    )

  def see(self, image: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
    """Encodes pictures or, where no patch is hidden, clips.

    The [CLS] of each frame sees all frames. Without temporal positions they are
    all the same, so that the first one stands for the clip.

    Args:
      image: uint8 `[B, H, W, 3]`, or `[B, F, H, W, 3]`.
      hidden: bool `[B, N]`, the patches that are hidden, or None.

    Returns:
      `[B, 1 + N, D]`, or `[B, F + F N, D]`: [CLS] first, one a frame, after the
      final norm.
    """
    tokens = self.vision.encode(self.vision.embed(image, hidden))
    return self.vision_norm(jnp.concatenate(tokens, axis=1))

  def embed_image(self, tokens: jax.Array) -> jax.Array:
    """Unit embeddings `[B, E]` of what `see` returns."""
    return unit(self.image_projection(tokens[:, 0]))

  def embed_text(self, text: jax.Array) -> jax.Array:
    """Embeds token ids `[B, L]`: `[B, L, D]`; see `SingleStream.embed`."""
    return self.stream.embed(text)

  def read(self, x: jax.Array, text_len: jax.Array):
    """Encodes text alone; returns unit embeddings `[B, E]` and `[B, L, D]`."""
    tokens = self.stream.read(x, text_len)
    return unit(self.text_projection(tokens[:, 0])), tokens

  def project(self, tokens: jax.Array) -> KeysValues:
    """Keys and values of pictures, in every layer of the stream."""
    return self.stream.project(tokens)

  def text_given_image(self, x, text_len, keys_values, rows) -> jax.Array:
    """See `SingleStream.text_given_image`."""
    return self.stream.text_given_image(x, text_len, keys_values, rows)

  def image_given_text(self, tokens, x, text_len) -> jax.Array:
    """See `SingleStream.image_given_text`."""
    return self.stream.image_given_text(tokens, x, text_len)

  def match_logits(self, tokens: jax.Array) -> jax.Array:
    """Logits `[B, 2]` of (no match, match), of fused tokens `[B, L, D]`."""
    return self.matching(tokens[:, 0])

  def word_logits(self, tokens: jax.Array) -> jax.Array:
    """Logits of hidden words: `[..., D]` to float32 `[..., V]`."""
    x, bias = self.words(tokens)
    return self.stream.token_logits(x) + bias

  def divisor(self) -> jax.Array:
    """The temperature, a scalar."""
    return self.temperature()

  def encode_image(self, image: jax.Array) -> jax.Array:
    """Embeds uint8 pictures `[B, H, W, 3]`: float32 `[B, E]`, unit length."""
    return self.embed_image(self.see(image))

  def encode_text(self, text: jax.Array, text_len: jax.Array) -> jax.Array:
    """Embeds captions `[B, L]`: float32 `[B, E]`, unit length."""
    return self.read(self.stream.embed(text), text_len)[0]

  def fuse(
    self,
    text: jax.Array,
    text_len: jax.Array,
    keys_values: KeysValues,
    rows: jax.Array,
  ) -> jax.Array:
    """Encodes captions given pictures, from token ids on: `[M, L, D]`."""
    x = self.stream.embed(text)
    if self.stream.text_transformer is not None:
      x = self.stream.read(x, text_len)
    return self.stream.text_given_image(x, text_len, keys_values, rows)

  def __call__(self, image, text, text_len) -> None:
    """Touches every parameter, for `init`."""
    tokens = self.see(image)
    self.embed_image(tokens)
    self.encode_text(text, text_len)
    rows = jnp.arange(len(text))[None]
    fused = self.fuse(text, text_len, self.project(tokens), rows)
    self.match_logits(fused)
    self.word_logits(fused)
    self.divisor()


class GroundedEncoder(FusionEncoder):
  """The same with heads for hidden patches and for keywords.

  Attributes:
    patch_head: from a patch, encoded given text, to its visual code's logits
      or its pixels.
    keyword_head: from a picture to a logit for each word.
    keyword_feature: what it reads: the unit "embedding", or "cls".
  """

  patch_head: Projection
  keyword_head: Projection
  keyword_feature: str = "embedding"

  def patch_logits(self, tokens: jax.Array) -> jax.Array:
    """Maps `[..., D]` to float32 `[..., codes]`."""
    return self.patch_head(tokens)

  def keyword_logits(self, tokens: jax.Array) -> jax.Array:
    """Maps what `see` returns to a logit for each word, `[B, V]`."""
    by_cls = self.keyword_feature == "cls"
    return self.keyword_head(
      tokens[:, 0] if by_cls else self.embed_image(tokens)
    )

  def __call__(self, image, text, text_len) -> None:
    super().__call__(image, text, text_len)
    tokens = self.see(image)
    self.patch_logits(tokens)
    self.keyword_logits(tokens)
