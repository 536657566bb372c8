"""Alignment of attention: do words look at what they name?

The score of SCL's visual analysis (Ji et al. 2023; ALIGN-BENCH in its release):
the share of a map's attention that falls where it should,

  score = sum(mask * attention) / sum(attention).

Maps are cross-attention of the last text layer, of the head that looks most.
`global` takes that of the text's first token, which stands for all of it, and
the union of all that the caption names; `local` the sum over the words of a
phrase, and what this phrase names. A patch of the mask is the share of it that
boxes cover. (The release resizes masks bicubically, which makes values below 0
and above 1, and its scripts read maps of self-attention.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlp_jax.data import captions
from vlp_jax.evaluators import _boxes, _regions, base

_WHOLE = 0.9  # boxes of a larger share of the picture say nothing


class _Example(NamedTuple):
  """A picture, or a clip of F frames, and its first caption.

  Attributes:
    caption: as the model reads it.
    phrases: what it names, each with the places of its tokens, at least one.
  """

  caption: str
  phrases: list[tuple[_regions.Phrase, list[int]]]


class Evaluator(base.Evaluator):
  """`global` and `local`, each with its `_chance`.

  Both are means over pictures; a picture's `local` is the mean over its
  phrases. Phrases are the terms of the picture's first caption, and name the
  objects that they fit. `global` leaves out boxes of more than 90 % of the
  picture. Chance is the share of area of the mask, which a uniform map scores.
  A map without attention, or that is no number, scores 0.

  In a clip the boxes of each frame count for this frame's map.
  """

  needs = ("attention_maps",)
  annotations = ("objects",)
  captioned = True

  @functools.cached_property
  def _examples(self) -> list[_Example]:
    data = self.env.config.data
    clean, examples = captions.cleaner(data), []
    for record in self.records:
      caption = clean(record["captions"][0])
      phrases = _regions.phrases(
        self.source.language, caption, record["objects"], data.num_frames
      )
      placed = [(phrase, self._places(caption, phrase)) for phrase in phrases]
      placed = [(phrase, places) for phrase, places in placed if places]
      examples.append(_Example(caption, placed))
    return examples

  def _places(self, caption: str, phrase: _regions.Phrase) -> list[int]:
    """Lists the places of a phrase's tokens; none if all are cut off."""
    end = phrase.start + len(phrase.text)
    last = self.env.config.tokenizer.max_len - 1  # of the end symbol
    places = [
      1 + i
      for i, (_, low, high) in enumerate(self.env.tokenizer.pieces(caption))
      if low < end and high > phrase.start
    ]
    return [place for place in places if place < last]

  def run(self, params):
    chosen = [i for i, e in enumerate(self._examples) if e.phrases]
    if not chosen:
      return {}
    pairs = [(i, self._examples[i].caption) for i in chosen]
    maps = self.on_pairs(self.compiled("attention_maps"), params, pairs)
    scores = {"global": [], "local": []}
    for i, rows in zip(chosen, maps, strict=True):
      phrases = self._examples[i].phrases
      scores["local"].append(np.mean([_local(rows, *p) for p in phrases], 0))
      found = _global(rows, [phrase for phrase, _ in phrases])
      if found is not None:
        scores["global"].append(found)
    metrics = {}
    for name, values in scores.items():
      if values:
        metrics[name], metrics[f"{name}_chance"] = np.mean(values, 0).tolist()
    return metrics


def _local(
  rows: np.ndarray, phrase: _regions.Phrase, places: list[int]
) -> tuple[float, float]:
  """Scores a phrase, and chance, by maps of all tokens `[L, F, gh, gw]`."""
  attention = rows[places].sum(axis=0)
  mask = _mask(phrase.frames, attention.shape[1:])
  return score(attention, mask), float(mask.mean())


def _global(
  rows: np.ndarray, phrases: list[_regions.Phrase]
) -> tuple[float, float] | None:
  """Scores the first token, and chance; None if there is no box."""
  tracks = zip(*(phrase.frames for phrase in phrases), strict=True)
  frames = [
    [box for box in itertools.chain(*lists) if _area(box) <= _WHOLE]
    for lists in tracks
  ]
  if not any(frames):
    return None
  mask = _mask(frames, rows.shape[2:])
  return score(rows[0], mask), float(mask.mean())


def _area(box: _regions.Box) -> float:
  x0, y0, x1, y1 = box
  return (x1 - x0) * (y1 - y0)


def _mask(frames: Sequence[Sequence[_regions.Box]], grid: tuple[int, int]):
  """Says which share of each patch lies in boxes, float64 `[F, *grid]`."""
  return np.stack([_boxes.coverage(boxes, *grid) for boxes in frames])


def score(attention: np.ndarray, mask: np.ndarray) -> float:
  """Share of attention inside of a mask.

  Args:
    attention: float `[F, rows, columns]`, not negative.
    mask: float `[F, rows, columns]`, 0 to 1.
  """
  total = attention.sum(dtype=np.float64)
  return float((mask * attention).sum() / total) if total > 0 else 0.0
