"""Truth of texts about annotated pictures, and baselines that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlp_jax.data import scenes_language, scenes_probes
from vlp_jax.evaluators import _batching

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
  moves = [1 + shift for shift in _batching.spread(count - 1, _NUM_MOVES)]
  return float(
    np.mean(
      [
        judge(text, (picture + move) % count)
        for move in moves
        for text, picture in enumerate(owner)
      ]
    )
  )


def bag_vectors(
  pictures: Sequence[Sequence[dict[str, Any]]], texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns vectors whose products are `scenes_probes.bag_scores`.

  Args:
    pictures: the objects of P pictures.
    texts: T texts of the language of scenes.

  Returns:
    float32 `[P, 14]` and `[T, 14]`.
  """
  bag = scenes_probes.bag_of_attributes
  seen = np.stack([bag(objects) for objects in pictures]).astype(np.float32)
  said = np.stack([bag(text) for text in texts]).astype(np.float32)
  # -(100 said(1 - seen) + (1 - said)seen), multiplied out.
  seen_size, said_size = seen.sum(1, keepdims=True), said.sum(1, keepdims=True)
  return (
    np.hstack([seen, np.ones_like(seen_size), seen_size]),
    np.hstack([101 * said, -100 * said_size, -np.ones_like(said_size)]),
  )
