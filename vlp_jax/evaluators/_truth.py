"""Truth of texts about annotated pictures, and baselines that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlp_jax.data import scenes_language
from vlp_jax.evaluators import base

# A chance level moves every text to this many other pictures.
_NUM_MOVES = 16


def parse(text: str):
  """Returns the meaning of a text, or None where the parser finds none."""
  return scenes_language.parse(text)


def holds(meaning, objects: Sequence[dict[str, Any]]) -> bool:
  """Tells whether a meaning is true of a picture's objects; None is not."""
  return meaning is not None and scenes_language.is_true(meaning, objects)


def moved_rate(
  judge: Callable[[int, int], bool], owner: Sequence[int]
) -> float:
  """Share of texts that a judge accepts at pictures that are not theirs.

  Args:
    judge: takes the places of a text and of a picture.
    owner: for each text the place of its picture; all pictures have one.

  Returns:
    The mean over all texts and `_NUM_MOVES` fixed other pictures each.
  """
  count = int(max(owner)) + 1
  if count < 2:
    return 0.0
  moves = [1 + shift for shift in base.spread(count - 1, _NUM_MOVES)]
  return float(
    np.mean([
      judge(text, (picture + move) % count)
      for move in moves
      for text, picture in enumerate(owner)
    ])
  )
