"""The curves of a run: its loss, the loss's terms, and retrieval."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
import matplotlib.ticker
import numpy as np

from vlp_jax.evaluators._plots import GREY, INK, LINES, SMALL, Sheet
from vlp_jax.methods.base import Method

_RECALL = re.compile(r"(\w+)/retrieval/((?:i2t|t2i)_r(?:1|5|10))")

Curve = tuple[np.ndarray, np.ndarray]


def loss_curves(method: Method, path: pathlib.Path) -> Sheet | None:
  """Draws `metrics.jsonl`: terms of the loss, and retrieval while training.

  Args:
    method: tells which of the logged numbers are terms.
    path: the file; without any training loss in it there is nothing to draw.
  """
  curves = read(path)
  if "train/loss" not in curves:
    return None
  recalls = _recalls(curves)
  panel, gap, top, height = 5.2, 0.9, 0.75, 3.6
  clips = "train_clips/loss" in curves
  sheet = Sheet(
    "Training: loss and retrieval over the steps",
    "Left, the loss, and its terms before they are weighted; lower is better. "
    + ("Dashed: of the steps on clips. " if clips else "")
    + (
      "Right, how often retrieval finds the right one among the first 1, 5 or "
      "10 on data that it was not trained on; higher is better. Dotted: chance."
      if recalls
      else ""
    ),
    panel + (gap + panel if recalls else 0) + 0.4,
    top + height + 0.55,
  )
  axes = sheet.axes(0.5, top, panel - 0.3, height)
  names = ["loss", *method.term_weights(jnp.int32(0))]
  names = [name for name in names if f"train/{name}" in curves]
  for name, color in zip(names, [INK, *LINES * len(names)], strict=False):
    width = 2.2 if name == "loss" else 1.5
    label = f"train/{name}"
    _draw(axes, label, curves[label], color, name, linewidth=width)
    label = f"train_clips/{name}"
    if label in curves:
      style = dict(linestyle="--", linewidth=width)
      _draw(axes, label, curves[label], color, f"_{name}", **style)
  axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
  _finish(axes, "loss", columns=4)
  if not recalls:
    return sheet
  axes = sheet.axes(panel + gap + 0.5, top, panel - 0.3, height)
  for name in recalls:
    way, k = re.search(r"(i2t|t2i)_r(\d+)$", name).groups()
    color = LINES[("1", "5", "10").index(k)]
    dash = "-" if way == "i2t" else "--"
    words = "picture → text" if way == "i2t" else "text → picture"
    label = f"{words}, first {k}"
    _draw(axes, name, curves[name], color, label, linestyle=dash)
    if way == "i2t" and f"{name}_chance" in curves:
      chance = curves[f"{name}_chance"][1][-1]
      axes.axhline(chance, color=color, linestyle=":", linewidth=1)
  axes.set_ylim(0, 1.02)
  split = recalls[0].split("/")[0]
  _finish(axes, f"recall ({split})", columns=2)
  return sheet


def read(path: pathlib.Path) -> dict[str, Curve]:
  """Reads a `metrics.jsonl` as (steps, values) by name; a step's last counts.

  A line that a crash cut short is passed over; null is NaN.
  """
  points: dict[str, dict[int, float]] = {}
  lines = path.read_text().splitlines() if path.is_file() else []
  for line in lines:
    try:
      record = json.loads(line)
      step = int(record.pop("step"))
    except (ValueError, TypeError, KeyError, AttributeError):
      continue
    for name, value in record.items():
      value = np.nan if value is None else value
      if isinstance(value, int | float):
        points.setdefault(name, {})[step] = float(value)
  return {
    name: tuple(np.array(sorted(values.items())).T)
    for name, values in points.items()
  }


def _recalls(curves: dict[str, Curve]) -> Sequence[str]:
  """Lists the recalls of the prefix that was evaluated most often."""
  by_prefix: dict[str, list[str]] = {}
  for name in curves:
    if match := _RECALL.fullmatch(name):
      by_prefix.setdefault(match[1], []).append(name)
  return max(
    by_prefix.values(), key=lambda names: len(curves[names[0]][0]), default=[]
  )


def _draw(axes, name: str, curve: Curve, color, label: str, **style) -> None:
  """Draws a curve, with markers where there are few points."""
  steps, values = curve
  marker = "o" if len(steps) < 12 else ""
  axes.plot(
    *(steps, values),
    **{"color": color, "label": label, "marker": marker, "markersize": 4}
    | style,
    gid=name,
  )


def _finish(axes, quantity: str, columns: int) -> None:
  """Names the axes, and puts the legend above the lines."""
  axes.set_xlabel("step")
  axes.set_ylabel(quantity)
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.tick_params(colors=GREY)
  axes.legend(
    loc="lower left",
    bbox_to_anchor=(0, 1.01),
    ncols=columns,
    frameon=False,
    fontsize=SMALL,
    borderaxespad=0,
  )
