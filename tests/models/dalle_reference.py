"""DALL-E's encoder in NumPy, float64, pixel by pixel."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tests import toys


def convolve(p, x):
  """A convolution of `[H, W, C]` over zeros around it, pixel by pixel."""
  kernel = np.float64(p["kernel"])
  reach = kernel.shape[0] // 2
  padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
  out = np.zeros((*x.shape[:2], kernel.shape[-1]))
  for row, column in np.ndindex(*x.shape[:2]):
    window = padded[
      row : row + kernel.shape[0], column : column + kernel.shape[1]
    ]
    out[row, column] = window.ravel() @ kernel.reshape(window.size, -1)
  return out + p["bias"]


def block(p, x):
  """A residual block on `[H, W, C]`."""
  branch = x
  for i in range(1, 5):
    branch = convolve(p[f"conv_{i}"], np.maximum(branch, 0))
  return (convolve(p["id_path"], x) if "id_path" in p else x) + branch / 64


def pool(x):
  """The largest of each 2 x 2."""
  rows, columns = x.shape[0] // 2, x.shape[1] // 2
  out = np.empty((rows, columns, x.shape[2]))
  for row, column in np.ndindex(rows, columns):
    square = x[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    out[row, column] = square.max((0, 1))
  return out


def encode(p, pixels, blocks):
  """Logits of one picture, `[H, W, 3]` in [0, 1]."""
  x = convolve(p["input"], 0.8 * np.float64(pixels) + 0.1)
  for group in range(1, 5):
    for i in range(1, blocks + 1):
      x = block(p[f"group_{group}_block_{i}"], x)
    x = pool(x) if group < 4 else x
  return convolve(p["output"], np.maximum(x, 0))


def parameters(module, *shape):
  """Drawn parameters under which activations neither vanish nor explode."""
  pixels = jnp.zeros((1, *shape))
  shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
  drawn = toys.random_like(shapes)

  def scale(path, leaf):
    if path[-1].key == "bias":
      return leaf
    return leaf * 5 * (2 / math.prod(leaf.shape[:-1])) ** 0.5

  return jax.tree_util.tree_map_with_path(scale, drawn)
