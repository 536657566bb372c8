"""Truth of texts about annotated pictures, and baselines that need no model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from vlp_jax.data import scenes_probes
from vlp_jax.evaluators import _batching

# A chance level moves every text to this many other pictures.
_NUM_MOVES = 16


def holds(
  language: ModuleType, meaning, objects: Sequence[dict[str, Any]]
) -> bool:
  """Tells whether a meaning is true of a picture's objects.

  Args:
    language: of the source, which has parsed the meaning.
    meaning: None, of a text that is not in the language, is not true.
    objects: of a picture or a clip.
  """
  return meaning is not None and language.is_true(meaning, objects)


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
  language: ModuleType,
  pictures: Sequence[Sequence[dict[str, Any]]],
  texts: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns vectors whose products are `scenes_probes.bag_scores`.

  Args:
    language: of the source; its `ATTRIBUTES` have A values in all.
    pictures: the objects of P pictures.
    texts: T texts of this language.

  Returns:
    float32 `[P, A + 2]` and `[T, A + 2]`.
  """
  bag = functools.partial(scenes_probes.bag_of_attributes, language=language)
  seen = np.stack([bag(objects) for objects in pictures]).astype(np.float32)
  said = np.stack([bag(text) for text in texts]).astype(np.float32)
  # -(100 said(1 - seen) + (1 - said)seen), multiplied out.
  seen_size, said_size = seen.sum(1, keepdims=True), said.sum(1, keepdims=True)
  return (
    np.hstack([seen, np.ones_like(seen_size), seen_size]),
    np.hstack([101 * said, -100 * said_size, -np.ones_like(said_size)]),
  )
