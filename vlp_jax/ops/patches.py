"""Pictures as grids of patches, and the positions of those."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Channel statistics of CLIP's training pictures, in [0, 1]
# (Radford et al. 2021, as published with the code).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(image: jax.Array) -> jax.Array:
  """Maps uint8 pixels `[..., 3]` to float32 with CLIP's mean and deviation."""
  scale = 1 / (255 * np.array(STD))
  shift = -np.array(MEAN) / np.array(STD)
  return image.astype(jnp.float32) * jnp.array(scale) + jnp.array(shift)


def denormalize(pixels: jax.Array) -> jax.Array:
  """Maps float pixels back to uint8, the inverse of `normalize`."""
  pixels = (pixels * jnp.array(STD) + jnp.array(MEAN)) * 255
  return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def patchify(image: jax.Array, size: int) -> jax.Array:
  """Cuts `[B, H, W, C]` into `[B, N, size * size * C]`, row by row."""
  b, h, w, c = image.shape
  grid = image.reshape(b, h // size, size, w // size, size, c)
  return grid.swapaxes(2, 3).reshape(b, -1, size * size * c)


def patch_pixels(image: jax.Array, size: int) -> jax.Array:
  """Cuts uint8 `[B, H, W, 3]` into normalised float32 `[B, N, size^2 * 3]`."""
  return patchify(normalize(image), size)


def unpatchify(patches: jax.Array, size: int) -> jax.Array:
  """Puts the patches of a square picture together: `[B, side, side, C]`."""
  b, n, d = patches.shape
  side = round(n**0.5)
  grid = patches.reshape(b, side, side, size, size, d // size**2)
  return grid.swapaxes(2, 3).reshape(b, side * size, side * size, -1)


@functools.cache
def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
  """Returns fixed 2-D sine-cosine positions `[rows * columns, width]`.

  A quarter of the channels each for the sine and the cosine of the row and of
  the column, with wavelengths from 2 pi to 10,000 * 2 pi (Chen et al. 2021,
  "An empirical study of training self-supervised vision transformers").

  Raises:
    ValueError: if `width` is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(f"sine-cosine positions need width % 4 == 0, not {width}")
  omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
  rows, columns = np.meshgrid(*map(np.arange, grid), indexing="ij")
  angles = [axis.reshape(-1, 1) * omega for axis in (rows, columns)]
  waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


@functools.cache
def _bicubic(old: int, new: int) -> np.ndarray:
  """The 1-D resize `[new, old]` that PyTorch's bicubic does.

  Cubic convolution with a = -0.75, half-pixel centres and clamped borders,
  without antialiasing; `jax.image.resize` uses a = -0.5, and released
  checkpoints were resized with the former.
  """
  a = -0.75

  def kernel(x):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

  matrix = np.zeros((new, old))
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  for tap in range(-1, 3):
    at = np.floor(centre) + tap
    column = np.clip(at, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), column), kernel(centre - at))
  return matrix.astype(np.float32)


def resize_frames(rows: jax.Array, count: int, fill: str) -> jax.Array:
  """Makes temporal positions `[T, D]` ones of another number of frames.

  Fewer frames take the first rows. For more of them the rows are followed by
  zeros (`fill="zero"`), or stretched linearly, ends on ends (`interpolate`):
  the two that Bain et al. 2021 (Frozen in Time) compare.

  Returns:
    `[count, D]`.
  """
  old = len(rows)
  if count <= old:
    return rows[:count]
  if fill == "zero":
    return jnp.pad(rows, ((0, count - old), (0, 0)))
  at = np.linspace(0, old - 1, count)
  weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
  return jnp.asarray(weights, rows.dtype) @ rows


def resize_positions(
  positions: jax.Array, old: tuple[int, int], new: tuple[int, int]
) -> jax.Array:
  """Resizes a grid of positions `[old rows * old columns, D]` bicubically.

  Equal to PyTorch's `interpolate(mode="bicubic", align_corners=False)`.

  Returns:
    `[new rows * new columns, D]`; the input itself when the grids agree.
  """
  if old == new:
    return positions
  table = positions.reshape(*old, -1)
  rows, columns = (_bicubic(a, b) for a, b in zip(old, new, strict=True))
  for weights, axes in ((rows, "ri,ijd->rjd"), (columns, "cj,rjd->rcd")):
    table = jnp.einsum(axes, weights, table, precision="highest")
  return table.reshape(new[0] * new[1], -1)
