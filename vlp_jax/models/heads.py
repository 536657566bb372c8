"""What is put on top of towers: projections, vocabulary, pixels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.dense import Dense
from vlp_jax.models.transformer import gelu, layer_norm
from vlp_jax.ops import linear


class TextProjection(nn.Module):
  """Norm and bias-free matrix into the joint space, in float32.

  Attributes:
    embed_dim: E.
    dtype: of the norm's output.
  """

  embed_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., D]` to `[..., E]`, not yet of unit length."""
    x = layer_norm("norm", self.dtype)(x)
    return Dense(
      self.embed_dim,
      use_bias=False,
      kernel_init=initializers.normal(x.shape[-1] ** -0.5),
      name="projection",
    )(x.astype(jnp.float32))


class VocabularyHead(nn.Module):
  """Logits of the next token: a bias-free matrix, not tied to the embedding.

  Attributes:
    vocab_size: V.
    width: D.
    dtype: of the matrix product; its result is float32.
    std: of the starting values; None takes 1 / sqrt(D).
  """

  vocab_size: int
  width: int
  dtype: Any = jnp.float32
  std: float | None = None

  def setup(self):
    # open_clip leaves this matrix uninitialised; by default it starts here as
    # its text projection does.
    std = self.width**-0.5 if self.std is None else self.std
    self.kernel = self.param(
      "kernel", initializers.normal(std), (self.width, self.vocab_size)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., D]` to float32 `[..., V]`."""
    return linear.matmul(
      x.astype(self.dtype),
      self.kernel.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )


class LogitScale(nn.Module):
  """The temperature of contrastive logits, as the logarithm of its inverse.

  Attributes:
    start: the starting value of exp(logit_scale); 1 / 0.07 in CLIP and CoCa.
    bias: the starting value of an additive bias (SigLIP), or None.
  """

  start: float = 1 / 0.07
  bias: float | None = None

  def setup(self):
    constant = nn.initializers.constant
    self.logit_scale = self.param(
      "logit_scale", constant(jnp.log(self.start)), ()
    )
    if self.bias is not None:
      self.logit_bias = self.param("logit_bias", constant(self.bias), ())

  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    """Returns exp(logit_scale) and the bias (None without one)."""
    scale = jnp.exp(self.logit_scale)
    return scale, None if self.bias is None else self.logit_bias


class PatchDecoderInput(nn.Module):
  """Tokens of a masked picture for a decoder (He et al. 2022, section 3).

  Visible tokens are normed and mapped to the decoder's width, one learned
  token stands for every hidden patch, and fixed 2-D positions say where each
  belongs.

  Attributes:
    width: the decoder's channels.
    dtype: of the matrix product.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, visible: jax.Array, visible_pos: jax.Array, hidden_pos: jax.Array
  ) -> jax.Array:
    """Builds the sequence, visible patches first.

    Args:
      visible: `[B, V, D]`.
      visible_pos: `[B, V, width]`.
      hidden_pos: `[B, K, width]`.

    Returns:
      `[B, V + K, width]`.
    """
    x = Dense(
      self.width,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="visible",
    )(layer_norm("norm", self.dtype)(visible))
    token = self.param("mask_token", initializers.normal(0.02), (self.width,))
    hidden = token.astype(self.dtype) + hidden_pos.astype(self.dtype)
    return jnp.concatenate([x + visible_pos.astype(self.dtype), hidden], axis=1)


class PixelHead(nn.Module):
  """Pixels of a patch, in float32.

  Attributes:
    patch_size: side of a patch.
  """

  patch_size: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, K, D]` to `[B, K, patch_size * patch_size * 3]`."""
    return Dense(
      3 * self.patch_size**2,
      kernel_init=nn.initializers.xavier_uniform(),
      name="pixels",
    )(x.astype(jnp.float32))


class Projection(nn.Module):
  """A matrix and a bias, in float32, that start as PyTorch's do.

  Attributes:
    features: E.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., D]` to float32 `[..., E]`."""
    bound = initializers.uniform(x.shape[-1] ** -0.5)
    return Dense(
      self.features, kernel_init=bound, bias_init=bound, name="projection"
    )(x.astype(jnp.float32))


class DeepProjection(nn.Module):
  """Two matrices into the joint space, a norm and GELU between, in float32.

  They start as PyTorch's do.

  Attributes:
    features: E.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., D]` to float32 `[..., E]`."""
    x = x.astype(jnp.float32)
    bound = initializers.uniform(x.shape[-1] ** -0.5)
    x = Dense(x.shape[-1], kernel_init=bound, bias_init=bound, name="hidden")(x)
    x = gelu(layer_norm("norm")(x))
    return Dense(
      self.features, kernel_init=bound, bias_init=bound, name="projection"
    )(x)


class Temperature(nn.Module):
  """What contrastive logits are divided by; ALBEF keeps it in [0.001, 0.5].

  Attributes:
    start: its starting value.
  """

  start: float = 0.07

  @nn.compact
  def __call__(self) -> jax.Array:
    """Returns the temperature, a scalar."""
    return self.param("value", nn.initializers.constant(self.start), ())


class WordHead(nn.Module):
  """BERT's head for hidden words, before the product with the embeddings.

  Attributes:
    vocab_size: V.
    epsilon: of the norm.
    dtype: of the matrix product.
  """

  vocab_size: int
  epsilon: float = 1e-12
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps `[..., D]` to `[..., D]`; returns that, and a bias `[V]`."""
    x = Dense(
      x.shape[-1],
      kernel_init=initializers.normal(0.02),
      dtype=self.dtype,
      name="transform",
    )(x)
    x = layer_norm("norm", self.dtype, self.epsilon)(gelu(x))
    return x, self.param("bias", nn.initializers.zeros, (self.vocab_size,))
