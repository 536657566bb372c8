"""The pointing game: does a phrase point at the object that it names?

Zhang et al. (2018), section 4.1: a phrase's heat map hits if its highest
point lies in the phrase's box. Here the point is the centre of the best
patch, and pictures with a single object do not count, where any attention to
the foreground would do.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.evaluators import _batching, base
from vlp_jax.methods.base import Method


class Evaluator(base.Evaluator):
  """`accuracy` of one readout, `accuracy_<readout>` of the method's others.

  Beside them `accuracy_chance`, a random patch (the share of patch centres
  inside the box), and `accuracy_random_object`, the centre of a random object
  of the picture: what a map that finds objects, but not the right one, gets.
  If several patches share the maximum, the share of them that hits counts.

  Config field `readout`: how a map is read off the method; empty means the
  first of `method.readouts`.
  """

  needs = ("patch_text_map", "readouts")
  annotations = ("phrases",)
  fields = {"readout": ""}  # noqa: RUF012

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    self.readout = base.choose_readout("pointing", config.readout, method)

  @functools.cached_property
  def _phrases(self) -> list[tuple[int, str, list[float]]]:
    """Place of the picture, text and box of every phrase that counts."""
    return [
      (i, phrase["text"], phrase["bbox"])
      for i, record in enumerate(self.records)
      if len(record["objects"]) > 1
      for phrase in record["phrases"]
    ]

  def run(self, params):
    if not self._phrases:
      return {}
    pairs = [(i, text) for i, text, _ in self._phrases]
    boxes = np.array([box for _, _, box in self._phrases])
    maps = self.on_pairs(_all_maps(self.method, self.env.mesh), params, pairs)
    metrics = {}
    for i, readout in enumerate(self.method.readouts):
      hit = float(hits(maps[:, i], boxes).mean())
      name = "accuracy" if readout == self.readout else f"accuracy_{readout}"
      metrics[name] = hit
    area = patches_inside(boxes, *maps.shape[2:]).mean(axis=(1, 2))
    metrics["accuracy_chance"] = float(area.mean())
    metrics["accuracy_random_object"] = float(
      np.mean([self._random_object(i, box) for i, _, box in self._phrases])
    )
    return metrics

  def _random_object(self, picture: int, box) -> float:
    """Share of the picture's objects whose centre lies in the box."""
    boxes = np.array([o["bbox"] for o in self.records[picture]["objects"]])
    x, y = boxes[:, [0, 2]].mean(axis=1), boxes[:, [1, 3]].mean(axis=1)
    x0, y0, x1, y1 = box
    return float(((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).mean())


@functools.lru_cache(maxsize=8)
def _all_maps(method: Method, mesh: Mesh):
  """Jits all readouts at once: they share the towers, which cost the most."""

  def maps(params, batch):
    read = [
      method.patch_text_map(params, batch, readout=name)
      for name in method.readouts
    ]
    return jnp.stack(read, axis=1)

  return _batching.jit(maps, mesh)


def patches_inside(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Tells which patch centres lie in each box, bool `[N, rows, columns]`.

  Args:
    boxes: `[N, 4]`, x0, y0, x1, y1 as fractions of the picture.
    rows: patches from top to bottom.
    columns: patches from left to right.
  """
  y = ((np.arange(rows) + 0.5) / rows)[None, :, None]
  x = ((np.arange(columns) + 0.5) / columns)[None, None, :]
  x0, y0, x1, y1 = np.moveaxis(boxes[:, :, None, None], 1, 0)
  return (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)


def hits(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """Scores heat maps `[N, gh, gw]` against boxes `[N, 4]`, `[N]` in [0, 1]."""
  maps = np.where(np.isnan(maps), -np.inf, maps)
  best = maps == maps.max(axis=(1, 2), keepdims=True)
  inside = patches_inside(boxes, *maps.shape[1:])
  return (best & inside).sum(axis=(1, 2)) / best.sum(axis=(1, 2))
