"""From patch tokens to the image embedding and the decoder's context."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.dense import Dense, FromHeads, ToHeads
from vlp_jax.models.transformer import layer_norm
from vlp_jax.ops.attention import attend

KINDS = ("cls", "attention", "openclip", "parallel", "cascade")


class AttentionPool(nn.Module):
  """One attention layer with learned queries (CoCa section 3.2).

  Neither a residual connection nor an MLP: the output of a query is a sum of
  what the tokens contribute.

  Attributes:
    num_queries: Q.
    num_heads: heads; must divide `width`.
    width: channels of queries and output.
    dtype: of the matrix products.
    attention: what computes it, a name in `ops.attention.KERNELS`.
  """

  num_queries: int
  num_heads: int
  width: int
  dtype: Any = jnp.float32
  attention: str = "xla"

  def setup(self):
    heads = functools.partial(
      ToHeads,
      self.num_heads,
      self.width // self.num_heads,
      nn.initializers.xavier_uniform(),
      dtype=self.dtype,
    )
    self.query = self.param(
      "query", initializers.normal(1.0), (self.num_queries, self.width)
    )
    self.query_norm = layer_norm(dtype=self.dtype)
    self.token_norm = layer_norm(dtype=self.dtype)
    self.q, self.k, self.v = heads(), heads(), heads()
    self.out = FromHeads(
      self.width, initializers.uniform(self.width**-0.5), dtype=self.dtype
    )

  def _attend(self, tokens: jax.Array, read: bool = False):
    tokens = self.token_norm(tokens)
    q = self.q(self.query_norm(self.query)[None])
    q = jnp.broadcast_to(q, (tokens.shape[0], *q.shape[1:]))
    v = self.v(tokens)
    k = self.k(tokens)
    return *attend(q, k, v, read=read, kernel=self.attention), v

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Pools `[B, N, C]` to `[B, Q, width]`."""
    return self.out(self._attend(tokens)[0])

  def values(self, tokens: jax.Array) -> jax.Array:
    """What the output would be if all attention were on one token.

    Returns:
      `[B, N, width]`, one output a token.
    """
    return self.out(self.v(self.token_norm(tokens)))

  def contributions(self, tokens: jax.Array) -> jax.Array:
    """Splits the first query's output into one summand a token.

    Returns:
      `[B, N, width]`; the sum over N, plus the output's bias, is the output.
    """
    _, probabilities, v = self._attend(tokens, read=True)
    weighted = probabilities[:, :, 0].swapaxes(1, 2)[..., None] * v
    return self.out(weighted) - self.out(jnp.zeros_like(weighted[:1, :1]))


class ImagePool(nn.Module):
  """Makes the image embedding, and the tokens that a decoder attends to.

  Attributes:
    kind: where the two come from.
      - `cls`: [CLS] and the patches, normalised (open_clip's `coca_base`).
      - `attention`: one query over the patches; the decoder gets the patches
        (CoCa's ablation with n_query = 0).
      - `openclip`: the first of `num_queries` queries over [CLS] and patches;
        the decoder gets the others (open_clip's `coca_ViT-B-32`).
      - `parallel`, `cascade`: `num_queries` queries for the decoder, and one
        more for the embedding, which reads the encoder's output (parallel) or
        the decoder's queries (cascade, CoCa's default).
    embed_dim: E, of the joint space.
    width: channels of the pooled tokens.
    num_queries: of the generative pooler, where there is one.
    num_heads: of each pooler.
    dtype: of the matrix products.
    attention: of each pooler.
  """

  kind: str
  embed_dim: int
  width: int
  num_queries: int = 256
  num_heads: int = 8
  dtype: Any = jnp.float32
  attention: str = "xla"

  def setup(self):
    if self.kind not in KINDS:
      raise ValueError(f"pooler {self.kind!r} is none of {KINDS}")

    def pool(num_queries):
      return AttentionPool(
        num_queries, self.num_heads, self.width, self.dtype, self.attention
      )

    self.norm = layer_norm(dtype=self.dtype)
    if self.kind in ("openclip", "parallel", "cascade"):
      self.generative = pool(self.num_queries)
    if self.kind in ("attention", "parallel", "cascade"):
      self.contrastive = pool(1)
      self.embedding_norm = layer_norm(dtype=self.dtype)
    self.projection = Dense(
      self.embed_dim,
      use_bias=False,
      kernel_init=initializers.normal(self.width**-0.5),
    )

  def _embed(self, pooled: jax.Array) -> jax.Array:
    """Projects to the joint space in float32: `[B, ..., E]`."""
    if self.kind not in ("cls", "openclip"):
      pooled = self.embedding_norm(pooled)
    return self.projection(pooled.astype(jnp.float32))

  def __call__(
    self, cls: jax.Array | None, patches: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Pools.

    Args:
      cls: `[B, F, D]`, or None where the kind needs none. Of the frames of a
        clip each has one, which has seen all, and without temporal positions
        they are the same: the first is read.
      patches: `[B, K, D]`, all of the encoder's output or a part of it.

    Returns:
      The embedding `[B, E]`, float32 and not yet of unit length, and the
      decoder's context `[B, S, width]`.
    """
    if self.kind == "openclip":
      tokens = jnp.concatenate([cls, patches], axis=1)
      tokens = self.norm(self.generative(tokens))
      return self._embed(tokens[:, 0]), tokens[:, 1:]
    if self.kind == "cls":
      return self._embed(self.norm(cls)[:, 0]), self.norm(patches)
    if self.kind == "attention":
      context = self.norm(patches)
    else:
      context = self.norm(self.generative(patches))
    source = context if self.kind == "cascade" else patches
    return self._embed(self.contrastive(source)[:, 0]), context

  def patch_embeddings(self, patches: jax.Array) -> jax.Array:
    """Places single patches in the joint space.

    A patch's embedding is what the picture's would be if the poolers attended
    to this patch alone; without poolers, the patch is put through the same
    norm and projection as [CLS].

    Args:
      patches: `[B, K, D]`, the encoder's output.

    Returns:
      `[B, K, E]`, float32 and not yet of unit length.
    """
    if self.kind in ("cls", "openclip"):
      if self.kind == "openclip":
        patches = self.generative.values(patches)
      return self._embed(self.norm(patches))
    if self.kind == "cascade":
      patches = self.norm(self.generative.values(patches))
    return self._embed(self.contrastive.values(patches))

  def patch_parts(self, patches: jax.Array) -> jax.Array:
    """Splits the picture's embedding into one summand a patch.

    The pooled vector is a sum over patches; what follows it is linear but for
    the norm's one common scale, which is held at the picture's. So the parts
    add up to the embedding, up to a constant.

    Args:
      patches: `[B, N, D]`, the encoder's output; the kind is `attention`.

    Returns:
      `[B, N, E]`, float32.
    """
    pooled = self.contrastive(patches)[:, 0]
    _, push = jax.linearize(self._embed, pooled)
    parts = self.contrastive.contributions(patches)
    return jax.vmap(push, in_axes=1, out_axes=1)(parts)
