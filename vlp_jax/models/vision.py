"""The vision tower: patches, positions, frames, transformer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models import initializers
from vlp_jax.models.dense import Dense
from vlp_jax.models.transformer import ACTIVATIONS, Transformer, layer_norm
from vlp_jax.ops import linear
from vlp_jax.ops import patches as patches_lib

POSITIONS = ("learned", "sincos")
STEMS = ("linear", "hmlp")
FRAME_FILLS = ("zero", "interpolate")


class LinearStem(nn.Module):
  """A matrix from pixels to channels, the same for every patch.

  It is a convolution whose stride is its size, and its kernel is stored as
  one; as a product it is faster on a CPU and shares its input with the
  targets of masked reconstruction.

  Attributes:
    patch_size: side of a patch, in pixels.
    width: channels D.
    use_bias: whether a bias is added; CLIP has none, ViT and DeiT have one.
    dtype: of the matrix product.
  """

  patch_size: int
  width: int
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps `[B, N, patch_size * patch_size * 3]` to `[B, N, D]`."""
    fan_in = pixels.shape[-1]
    kernel = self.param(
      "kernel",
      initializers.uniform(fan_in**-0.5),
      (self.patch_size, self.patch_size, 3, self.width),
    )
    kernel = kernel.reshape(fan_in, self.width).astype(self.dtype)
    x = linear.matmul(pixels.astype(self.dtype), kernel)
    if self.use_bias:
      zeros = nn.initializers.zeros
      x += self.param("bias", zeros, (self.width,)).astype(self.dtype)
    return x


class HMLPStem(nn.Module):
  """A small network from pixels to channels, the same for every patch.

  The hierarchical MLP stem of Touvron et al. 2022 ("Three things everyone
  should know about vision transformers", section 5): blocks of 4 x 4 pixels
  are embedded, and merged four to one until one is left. Unlike a stem of
  overlapping convolutions it keeps patches apart, so that a hidden patch
  stays hidden. Here without batch norm.

  Attributes:
    patch_size: side of a patch in pixels, 4 times a power of 2.
    width: channels D; half as many before the last merge.
    activation: a name in `ACTIVATIONS`.
    dtype: of the matrix products.
  """

  patch_size: int
  width: int
  activation: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps `[B, N, patch_size * patch_size * 3]` to `[B, N, D]`."""
    side, half = self.patch_size, self.width // 2
    x = pixels.reshape(-1, side, side, 3)
    x, side = patches_lib.patchify(x, 4), side // 4
    while side > 1:
      x = ACTIVATIONS[self.activation](Dense(half, dtype=self.dtype)(x))
      x = patches_lib.patchify(x.reshape(-1, side, side, half), 2)
      side //= 2
    x = Dense(self.width, dtype=self.dtype)(x)
    return x.reshape(*pixels.shape[:2], self.width)


class VisionTower(nn.Module):
  """A vision transformer (Dosovitskiy et al. 2021), of any resolution.

  It is two steps, so that a method can hide patches between them: `embed`
  makes patch tokens that know their place, `encode` lets them attend. The
  output is the residual stream: what reads it brings its own norm.

  The same weights take videos (Ji et al. 2023, SCL): each frame has its own
  copy of [CLS], which sees all frames, while patches see their own frame. A
  video of one frame is a picture, and compiles to one. Without a [CLS] frames
  do not see each other.

  Attributes:
    patch_size: side of a patch, in pixels.
    grid: rows and columns of patches that the learned positions are made for;
      pictures of another size get them resized (bicubic).
    transformer: the stack.
    cls_token: whether a learned [CLS] is put first.
    stem: from a patch's pixels to channels: `linear`, or `hmlp`.
    positions: `learned`, or `sincos` (learned, starting from sine-cosine).
    pre_norm: whether a layer norm precedes the stack, as in CLIP.
    stem_bias: whether a linear stem has a bias.
    mask_token: whether there is a learned token that hides patches.
    frames: rows of learned temporal positions, of which a picture has the
      first; 0 has none: frames are then told apart by nothing.
    frame_fill: what frames beyond those get: `zero` or `interpolate`, see
      `ops.patches.resize_frames`.
    dtype: of the matrix products.
  """

  patch_size: int
  grid: tuple[int, int]
  transformer: Transformer
  cls_token: bool = True
  stem: str = "linear"
  positions: str = "learned"
  pre_norm: bool = True
  stem_bias: bool = False
  mask_token: bool = False
  frames: int = 0
  frame_fill: str = "zero"
  dtype: Any = jnp.float32

  def setup(self):
    width = self.transformer.width
    if self.stem == "linear":
      self.patch = LinearStem(
        self.patch_size, width, self.stem_bias, self.dtype
      )
    else:
      self.patch = HMLPStem(
        self.patch_size, width, self.transformer.activation, self.dtype
      )
    init = initializers.normal(width**-0.5)
    if self.positions == "sincos":
      table = patches_lib.sincos(self.grid, width)
      self.pos = self.param("pos", lambda key: jnp.asarray(table))
    else:
      count = self.grid[0] * self.grid[1]
      self.pos = self.param("pos", init, (count, width))
    if self.cls_token:
      self.cls = self.param("cls", init, (width,))
      self.cls_pos = self.param("cls_pos", init, (width,))
    if self.frames:
      self.temporal = self.param("temporal", init, (self.frames, width))
    if self.mask_token:
      self.hidden = self.param("mask_token", nn.initializers.zeros, (width,))
    if self.pre_norm:
      self.norm = layer_norm(dtype=self.dtype)

  def num_patches(self, image_shape: Sequence[int]) -> int:
    """Counts the patches of a picture or frame, `[..., H, W, 3]`."""
    height, width = image_shape[-3:-1]
    return (height // self.patch_size) * (width // self.patch_size)

  def embed(
    self, image: jax.Array, hidden: jax.Array | None = None
  ) -> jax.Array:
    """Cuts pictures into patch tokens with positions.

    Args:
      image: uint8 `[B, H, W, 3]` or `[B, F, H, W, 3]`; sides are multiples of
        the patch size.
      hidden: bool `[B, N]` or `[B, F, N]`, the patches of which only the place
        is known (as in BEiT, Bao et al. 2022); None hides nothing.

    Returns:
      `[B, N, D]` or `[B, F, N, D]`, row by row.
    """
    *leading, height, width, channels = image.shape
    pixels = patches_lib.patch_pixels(
      image.reshape(-1, height, width, channels), self.patch_size
    )
    shape = height // self.patch_size, width // self.patch_size
    pos = patches_lib.resize_positions(self.pos, self.grid, shape)
    if self.frames:
      pos = pos + self._temporal(1 if len(leading) == 1 else leading[1])
    tokens = self.patch(pixels)
    tokens = tokens.reshape(*leading, *tokens.shape[1:])
    if hidden is not None:
      mask_token = self.hidden.astype(tokens.dtype)
      tokens = jnp.where(hidden[..., None], mask_token, tokens)
    return tokens + pos.astype(self.dtype)

  def encode(self, tokens: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Lets tokens attend to each other.

    Args:
      tokens: `[B, K, D]` or `[B, F, K, D]`, all of `embed`'s or some, in any
        order.

    Returns:
      [CLS] `[B, F, D]`, one a frame (None without one), and patches
      `[B, F K, D]`, frame by frame.
    """
    batch, width = len(tokens), tokens.shape[-1]
    frames = tokens.shape[1] if tokens.ndim == 4 else 1
    if frames == 1 or not self.cls_token:
      tokens = tokens.reshape(-1, *tokens.shape[-2:])
    if self.cls_token:
      cls = self.cls + self.cls_pos
      if self.frames:
        cls = cls + self._temporal(frames)
      cls = jnp.broadcast_to(
        cls.astype(tokens.dtype), (*tokens.shape[:-2], 1, width)
      )
      tokens = jnp.concatenate([cls, tokens], axis=-2)
    if self.pre_norm:
      tokens = self.norm(tokens)
    tokens = self.transformer(tokens)
    if self.cls_token:
      cls, tokens = tokens[..., :1, :], tokens[..., 1:, :]
      return cls.reshape(batch, frames, width), tokens.reshape(batch, -1, width)
    return None, tokens.reshape(batch, -1, width)

  def _temporal(self, frames: int) -> jax.Array:
    """Temporal positions `[F, 1, D]`, the same for all tokens of a frame."""
    rows = patches_lib.resize_frames(self.temporal, frames, self.frame_fill)
    return rows[:, None]
