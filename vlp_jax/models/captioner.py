"""Two towers that meet in a joint space, and a decoder that writes captions.

`DualEncoder` is CLIP's arrangement, `Captioner` CoCa's. Methods call the
pieces; what is trained on them is written in `methods/`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.heads import LogitScale, TextProjection, VocabularyHead
from vlp_jax.models.poolers import ImagePool
from vlp_jax.models.stream import Stream
from vlp_jax.models.text import TextTower
from vlp_jax.models.vision import VisionTower
from vlp_jax.ops import decoding


def unit(x: jax.Array) -> jax.Array:
  """Scales the last axis to unit length."""
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, 1e-12)


class DualEncoder(nn.Module):
  """A vision tower and a text tower with a joint space.

  Attributes:
    vision: the vision tower.
    text: the text tower.
    image_pool: from patches to the image embedding.
    text_projection: from the caption's vector to the text embedding.
    temperature: of the contrastive logits.
  """

  vision: VisionTower
  text: TextTower
  image_pool: ImagePool
  text_projection: TextProjection
  temperature: LogitScale

  def see(self, patches: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Encodes patch tokens; see `VisionTower.encode`."""
    return self.vision.encode(patches)

  def embed_patches(self, image: jax.Array) -> jax.Array:
    """Cuts pictures into tokens; see `VisionTower.embed`."""
    return self.vision.embed(image)

  def pool(
    self, cls: jax.Array | None, patches: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the unit embedding `[B, E]` and the decoder's context."""
    embedding, context = self.image_pool(cls, patches)
    return unit(embedding), context

  def read(
    self, text: jax.Array, text_len: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the unit embedding `[B, E]` and the tokens `[B, L, D]`."""
    pooled, tokens = self.text(text, text_len)
    return unit(self.text_projection(pooled)), tokens

  def encode_image(self, image: jax.Array) -> jax.Array:
    """Embeds uint8 pictures `[B, H, W, 3]`: float32 `[B, E]`, unit length."""
    return self.pool(*self.see(self.embed_patches(image)))[0]

  def encode_text(self, text: jax.Array, text_len: jax.Array) -> jax.Array:
    """Embeds captions `[B, L]`: float32 `[B, E]`, unit length."""
    return self.read(text, text_len)[0]

  def logit_scale(self) -> tuple[jax.Array, jax.Array | None]:
    """Returns exp(logit_scale) and the logit bias."""
    return self.temperature()

  def patch_embeddings(self, patches: jax.Array) -> jax.Array:
    """Unit embeddings of single patches `[B, N, E]`; see `ImagePool`."""
    return unit(self.image_pool.patch_embeddings(patches))

  def patch_parts(self, patches: jax.Array) -> jax.Array:
    """What each patch brings to the joint space, `[B, N, E]`.

    Its part in the picture's embedding where that is a sum over patches, else
    its own unit embedding.
    """
    if self.image_pool.kind == "attention":
      return self.image_pool.patch_parts(patches)
    return self.patch_embeddings(patches)

  def token_embeddings(self, tokens: jax.Array) -> jax.Array:
    """Unit embeddings of single text tokens `[B, L, E]`."""
    return unit(self.text_projection(tokens))

  def patch_contributions(
    self, image: jax.Array, text: jax.Array, text_len: jax.Array
  ) -> jax.Array:
    """How much each patch adds to the match of picture and caption `[B, N]`."""
    _, patches = self.see(self.embed_patches(image))
    embedding = self.read(text, text_len)[0]
    return jnp.einsum(
      "bne,be->bn", self.image_pool.patch_parts(patches), embedding
    )

  def patch_cosines(
    self, image: jax.Array, text: jax.Array, text_len: jax.Array
  ) -> jax.Array:
    """Cosine of each patch with the caption in the joint space `[B, N]`."""
    _, patches = self.see(self.embed_patches(image))
    embedding = self.read(text, text_len)[0]
    return jnp.einsum("bne,be->bn", self.patch_embeddings(patches), embedding)

  def __call__(
    self, image: jax.Array, text: jax.Array, text_len: jax.Array
  ) -> None:
    """Touches every parameter, for `init`."""
    self.encode_image(image)
    self.encode_text(text, text_len)
    self.logit_scale()


class Captioner(DualEncoder):
  """The dual encoder with a text decoder on its tokens.

  Attributes:
    decoder: causal over the text tokens, attending to the picture's context.
    vocabulary: logits of the next token.
  """

  decoder: Stream
  vocabulary: VocabularyHead

  def write(self, tokens: jax.Array, context: jax.Array) -> jax.Array:
    """Predicts each token's successor.

    Args:
      tokens: the text tower's output `[B, L, D]`.
      context: of the picture, `[B, S, D]`.

    Returns:
      The decoder's output `[B, L, D]`, which `logits` reads.
    """
    return self.decoder(tokens, context, causal=True)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps the decoder's output `[..., D]` to logits `[..., V]`, float32."""
    return self.vocabulary(hidden)

  def caption_logits(
    self, image: jax.Array, text: jax.Array, text_len: jax.Array
  ) -> jax.Array:
    """Logits of every next token, `[B, L - 1, V]`."""
    _, context = self.pool(*self.see(self.embed_patches(image)))
    _, tokens = self.read(text, text_len)
    return self.logits(self.write(tokens[:, :-1], context))

  def generate(
    self, image: jax.Array, max_len: int, bos_id: int, eos_id: int
  ) -> jax.Array:
    """Writes captions, greedily and with cached keys and values.

    Args:
      image: uint8 `[B, H, W, 3]`.
      max_len: tokens at most, start and end included.
      bos_id: the start symbol.
      eos_id: the end symbol.

    Returns:
      int32 `[B, max_len]`, padded with 0 after the end symbol.

    Raises:
      ValueError: if the text tower has fewer positions than `max_len`.
    """
    if max_len > self.text.max_len:
      # The look-up of a position would clamp, and repeat the last one.
      raise ValueError(
        f"{max_len} tokens need more than the {self.text.max_len} positions "
        "of the text tower"
      )
    _, context = self.pool(*self.see(self.embed_patches(image)))
    batch_size = image.shape[0]
    keys_values = self.decoder.transformer.project(context)

    def step(cache, token, position):
      text_cache, decoder_cache = cache
      x, text_cache = self.text.decode(token, text_cache, position)
      x, decoder_cache = self.decoder.decode(
        x, decoder_cache, position, keys_values
      )
      return self.logits(x[:, 0]), (text_cache, decoder_cache)

    towers = (self.text.transformer, self.decoder.transformer)
    cache = tuple(t.empty_cache(batch_size, max_len) for t in towers)
    return decoding.greedy(
      step, cache, batch_size, max_len, bos_id=bos_id, eos_id=eos_id
    )

  def __call__(
    self, image: jax.Array, text: jax.Array, text_len: jax.Array
  ) -> None:
    """Touches every parameter, for `init`."""
    self.caption_logits(image, text, text_len)
    self.logit_scale()
