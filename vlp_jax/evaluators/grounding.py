"""Weakly supervised grounding: which proposal does an expression refer to?

Protocol of ALBEF (Li et al. 2021, section 5) and SIMLA on RefCOCO+: the
method's map of an expression is enlarged to the picture; of a detector's
boxes, the one with the largest sum of the map over the square root of its
area is taken, and is right if its intersection over union with the true box
is 0.5 or more. The method has seen no boxes in training.

Their code keeps the box of the picture before where no proposal scores above
zero. Here all that share the best score count alike.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vlp_jax.data import transforms
from vlp_jax.data.warn import warn, warn_skipped
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _boxes, base

_ENOUGH = 0.5  # intersection over union
_NAMED = 5  # pictures that a warning names


class _Expression(NamedTuple):
  """An expression: the place of its picture, and the box that it is of."""

  picture: int
  text: str
  box: np.ndarray


class Evaluator(base.Evaluator):
  """`accuracy`, beside `accuracy_chance` and `accuracy_best`.

  Chance is a random proposal; `accuracy_best` is the share of expressions for
  which there is a right proposal: no method reaches more. If several proposals
  share the best score, the share of them that is right counts. Expressions of
  pictures without proposals count as wrong everywhere.

  Maps are taken as they are, so a readout should have no large negative
  values. Where `data.eval_resize` is 'crop', proposals are scored by what the
  model sees of them; whether one is right does not depend on that.

  Config fields:
    readout: how a map is read off the method; empty means the first of
      `method.readouts`.
    proposals: a JSON file of boxes [x, y, width, height] in pixels of the
      original picture: a list of `{"image_id": ..., "box": ...}`, or lists of
      boxes by image_id.
  """

  needs = ("patch_text_map", "readouts")
  fields = {"readout": "", "proposals": ""}  # noqa: RUF012

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    self.readout = base.choose_readout("grounding", config.readout, method)
    self._expressions = [
      expression
      for i, record in enumerate(self.records)
      for expression in _expressions(i, record, self.source.describe(i))
    ]
    if not self._expressions:
      raise base.NotApplicableError(
        "grounding is left out: no record of "
        f"{self.source.name!r} has referring expressions ('refs')"
      )
    if not config.proposals:
      raise UserError(
        "grounding's field proposals is empty; name a JSON file of boxes"
      )
    found = read_proposals(pathlib.Path(config.proposals).expanduser())
    places = dict.fromkeys(e.picture for e in self._expressions)
    self._proposals = {
      i: found[image_id]
      for i in places
      if (image_id := self.records[i]["image_id"]) in found
    }
    self._name_missing([i for i in places if i not in self._proposals])

  def _name_missing(self, pictures: list[int]) -> None:
    """Warns of pictures without proposals."""
    if not pictures:
      return
    file = self.config.proposals
    if not self._proposals:
      raise UserError(
        f"{file} has no proposals for any picture of {self.source.name!r}; is "
        "it of another data set?"
      )
    count = sum(e.picture not in self._proposals for e in self._expressions)
    names = [self.source.describe(i) for i in pictures[:_NAMED]]
    warn(
      f"{len(pictures):,} pictures of {self.source.name!r} have no proposals "
      f"in {file}, so {count:,} expressions count as wrong: "
      + ", ".join(names + ["..."] * (len(pictures) > _NAMED))
    )

  def run(self, params):
    maps = self.on_pairs(
      self.compiled("patch_text_map", readout=self.readout),
      params,
      [(e.picture, e.text) for e in self._expressions],
    )
    taken = [
      share_right(self._scores(e.picture, heat), right)
      for e, heat, right in zip(
        self._expressions, maps, self._right, strict=True
      )
    ]
    return {
      "accuracy": float(np.mean(taken)),
      "accuracy_chance": float(
        np.mean([right.mean() if len(right) else 0 for right in self._right])
      ),
      "accuracy_best": float(np.mean([right.any() for right in self._right])),
    }

  def _scores(self, picture: int, heat: np.ndarray) -> np.ndarray:
    """Scores the proposals of a picture by a map, `[P]`."""
    boxes = self._in_view.get(picture)
    if boxes is None:
      return np.zeros(0)
    area = _boxes.area(boxes)
    sums = _boxes.sums_in(heat, boxes, self.env.config.data.image_size)
    scores = sums / np.sqrt(np.where(area > 0, area, 1))
    return np.where((area > 0) & ~np.isnan(scores), scores, -np.inf)

  @functools.cached_property
  def _right(self) -> list[np.ndarray]:
    """Tells for each expression which proposals are right, bool `[P]`."""
    return [
      _boxes.iou(self._proposals[e.picture], e.box) >= _ENOUGH
      if e.picture in self._in_view
      else np.zeros(0, bool)
      for e in self._expressions
    ]

  @functools.cached_property
  def _in_view(self) -> dict[int, np.ndarray]:
    """The proposals as the model sees them, by place of the picture."""
    geometry = transforms.eval_geometry(self.env.config.data)
    boxes = {}
    for i, proposals in self._proposals.items():
      try:
        width, height = transforms.upright_size(self.source[i]["image"])
      except transforms.UnreadableImage as e:
        warn_skipped(self.source.name, self.source.describe(i), str(e))
        continue
      boxes[i] = _boxes.in_view(proposals, width, height, geometry)
    return boxes


def share_right(scores: np.ndarray, right: np.ndarray) -> float:
  """Share of right proposals among those with the best score; 0 of none."""
  return float(right[scores == scores.max()].mean()) if len(scores) else 0.0


def _expressions(
  picture: int, record: dict[str, Any], name: str
) -> list[_Expression]:
  """Reads a record's `refs`: JSON, as RefCOCO's builders write it."""
  try:
    return [
      _Expression(picture, text, np.array(ref["box"], float).reshape(4))
      for ref in json.loads(record.get("refs", "[]"))
      for text in ref["sentences"]
    ]
  except (TypeError, ValueError, KeyError) as e:
    raise UserError(
      f"{name}: refs is not a list of references with sentences and a box "
      f"({type(e).__name__}: {e})"
    ) from e


def read_proposals(path: pathlib.Path) -> dict[int, np.ndarray]:
  """Reads a detector's boxes.

  Args:
    path: see the field `proposals`. Rows may have more than is said there,
      and boxes more than four numbers, such as a score.

  Returns:
    float64 `[P, 4]`, x0, y0, x1, y1 in pixels, by image_id. Boxes without
    area are left out.

  Raises:
    UserError: if the file is missing or broken.
  """
  try:
    content = json.loads(path.read_bytes())
  except OSError as e:
    raise UserError(f"proposals {path}: {e.strerror}") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"proposals {path}: not JSON ({e})") from e
  grouped: dict[int, list] = {}
  try:
    if isinstance(content, dict):
      for image_id, rows in content.items():
        grouped.setdefault(int(image_id), []).extend(rows)
    else:
      for row in content:
        grouped.setdefault(int(row["image_id"]), []).append(row["box"])
  except (TypeError, ValueError, KeyError) as e:
    raise UserError(
      f"proposals {path}: neither a list of rows with image_id and box nor "
      f"lists of boxes by image_id ({type(e).__name__}: {e})"
    ) from e
  boxes = {i: _corners(path, i, rows) for i, rows in grouped.items() if rows}
  usable = {i: found[_boxes.area(found) > 0] for i, found in boxes.items()}
  empty = sum(map(len, boxes.values())) - sum(map(len, usable.values()))
  if empty:
    warn(f"proposals {path}: {empty:,} boxes without area are left out")
  return {i: found for i, found in usable.items() if len(found)}


def _corners(path: pathlib.Path, image_id: int, rows: list) -> np.ndarray:
  """Turns a picture's boxes [x, y, width, height, ...] into corners."""
  try:
    boxes = np.array([row[:4] for row in rows], float).reshape(len(rows), 4)
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < 0).any():
      raise ValueError("a number is negative or not finite")
  except (TypeError, ValueError, KeyError) as e:
    raise UserError(
      f"proposals {path}: image {image_id} has no boxes [x, y, width, height] "
      f"({e})"
    ) from e
  return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
