"""Boxes: where they are in what the model sees, and what a map has in them.

All boxes are x0, y0, x1, y1, with continuous edges: pixel i reaches from i to
i + 1.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from vlp_jax.data import transforms


def in_view(
  boxes: np.ndarray, width: int, height: int, geometry: transforms.Geometry
) -> np.ndarray:
  """Maps boxes of a picture to the square that the model sees of it.

  Args:
    boxes: float `[N, 4]`, in pixels of the picture.
    width: of the picture, in pixels.
    height: of the picture, in pixels.
    geometry: how the square is made.

  Returns:
    float64 `[N, 4]`, in pixels of the square and clipped to it; what is cut
    off has no area.
  """
  new_width, new_height, left, top = geometry.place(width, height)
  scale = np.array([new_width / width, new_height / height] * 2)
  boxes = np.asarray(boxes, np.float64) * scale - [left, top, left, top]
  return boxes.clip(0, geometry.size)


def area(boxes: np.ndarray) -> np.ndarray:
  """Returns the areas `[N]` of boxes `[N, 4]`."""
  return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Intersection over union `[N]` of boxes `[N, 4]` with one box `[4]`."""
  low = np.maximum(boxes[:, :2], box[:2])
  high = np.minimum(boxes[:, 2:], box[2:])
  shared = np.prod(np.maximum(high - low, 0), axis=1)
  union = area(boxes) + area(box[None]) - shared
  return shared / np.maximum(union, 1e-12)


def sums_in(heat: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
  """Sums a heat map, enlarged to the model's picture, over each box.

  The map is enlarged bicubically. A pixel that a box covers in part counts by
  that part. Both are linear and separable, so the enlarged map is not made:
  what each box takes of a row of pixels becomes what it takes of a row of
  patches.

  Args:
    heat: float `[rows, columns]`.
    boxes: float `[N, 4]`, in pixels of the picture.
    size: side of the picture, in pixels.

  Returns:
    float64 `[N]`.
  """
  rows, columns = heat.shape
  y = _covered(boxes[:, 1], boxes[:, 3], size) @ _enlarge(rows, size)
  x = _covered(boxes[:, 0], boxes[:, 2], size) @ _enlarge(columns, size)
  return np.einsum("ny,yx,nx->n", y, heat.astype(np.float64), x)


def _covered(low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
  """Says how much of each pixel lies between two edges, `[N, size]`."""
  pixel = np.arange(size)
  low, high = low[:, None], high[:, None]
  return np.maximum(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0)


@functools.lru_cache(maxsize=8)
def _enlarge(patches: int, size: int) -> np.ndarray:
  """Weights of `patches` values in each of `size` pixels, `[size, patches]`."""
  eye = np.eye(patches, dtype=np.float32)
  weights = jax.image.resize(eye, (size, patches), "cubic")
  return np.asarray(weights, np.float64)
