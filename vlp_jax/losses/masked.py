"""Reconstruction of masked patches, float32."""

import jax
import jax.numpy as jnp

from vlp_jax.ops import patches as patches_lib

TARGETS = ("normalized", "pixels")
DISTANCES = {"l2": jnp.square, "l1": jnp.abs}


def patch_targets(image: jax.Array, patch_size: int, target: str) -> jax.Array:
  """Returns what is to be predicted of every patch.

  Args:
    image: uint8 `[B, H, W, 3]`.
    patch_size: side of a patch.
    target: `pixels`, or `normalized`: each patch with mean 0 and (unbiased)
      variance 1, as in He et al. 2022, section 4.1.

  Returns:
    float32 `[B, N, patch_size * patch_size * 3]`.
  """
  pixels = patches_lib.patch_pixels(image, patch_size)
  if target == "pixels":
    return pixels
  mean = jnp.mean(pixels, axis=-1, keepdims=True)
  variance = jnp.var(pixels, axis=-1, keepdims=True, ddof=1)
  return (pixels - mean) / jnp.sqrt(variance + 1e-6)


def reconstruction(
  prediction: jax.Array, target: jax.Array, distance: str
) -> jax.Array:
  """Mean distance of each patch: `[B, K, P]` twice gives `[B, K]`.

  Args:
    prediction: float32 `[B, K, P]`.
    target: float32 `[B, K, P]`.
    distance: a name in `DISTANCES`.
  """
  return jnp.mean(DISTANCES[distance](prediction - target), axis=-1)
