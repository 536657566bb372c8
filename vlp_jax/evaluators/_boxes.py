"""Boxes: where they are in what the model sees, and what a map has in them.

All boxes are x0, y0, x1, y1, with continuous edges: pixel i reaches from i to
i + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


def coverage(
  boxes: Sequence[Sequence[float]], rows: int, columns: int
) -> np.ndarray:
  """Says which share of each patch lies in any of some boxes.

  Args:
    boxes: in fractions of the picture; they may overlap.
    rows: patches from top to bottom.
    columns: patches from left to right.

  Returns:
    float64 `[rows, columns]`, 0 to 1.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  # The edges of all boxes cut the picture into cells that lie in or out whole.
  x, y = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
  x0, y0, x1, y1 = boxes.T[:, :, None]
  across = (x0 <= x[:-1]) & (x[:-1] < x1)
  down = (y0 <= y[:-1]) & (y[:-1] < y1)
  inside = (down[:, :, None] & across[:, None]).any(axis=0)
  x = _covered(x[:-1] * columns, x[1:] * columns, columns)
  y = _covered(y[:-1] * rows, y[1:] * rows, rows)
  return y.T @ inside @ x


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
