"""What the clips are probed with, and what is reached with one frame.

A *one-frame model* knows everything that the middle frame of a clip shows, and
which kinds of motions its objects make, but not which way time runs. No model
of one frame knows more: the clips in which motions are reversed have the same
middle frame and are as likely (`motion_generate.py`). What is above its scores
says that a model sees motion.

  python -m vlp_jax.data.motion_probes [NAME] [SPLIT]

prints them, for scenes_video and its test split if nothing else is said.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data import motion_language as language
from vlp_jax.data.dice import Dice
from vlp_jax.data.scenes_language import Meaning, Object, say


def _say(objects: Sequence[Object]) -> str:
  terms = tuple(map(language.describe, objects))
  return say(Meaning(terms, ("and",) * (len(terms) - 1)))


def motion(objects: Sequence[Object], chosen: int) -> list[dict[str, str]]:
  """Makes "a red circle moves left and a blue star grows" against "a red circle
  moves right and a blue star grows", which is false of the clip.

  Args:
    objects: all of which the texts name.
    chosen: whose motion is reversed in the false one.

  Returns:
    one dict with `true` and `false`.
  """
  false = list(objects)
  false[chosen] = language.reverse(false[chosen])
  return [{"true": _say(objects), "false": _say(false)}]


def binding(objects: Sequence[Object], dice: Dice) -> list[dict[str, str]]:
  """Makes "a red circle moves left and a blue star grows" against "a red circle
  grows and a blue star moves left", which is false and has the same words.

  Returns:
    one dict with `true` and `false`, or none where there is no such pair.
  """
  for a, b in dice.shuffled([*itertools.permutations(objects, 2)]):
    swapped = {**a, "motion": b["motion"]}, {**b, "motion": a["motion"]}
    false = _say(swapped)
    if not language.is_true(language.parse(false), objects):
      return [{"true": _say([a, b]), "false": false}]
  return []


# --------------------------------------------------------------- one frame


@dataclasses.dataclass(frozen=True)
class OneFrame:
  """What a one-frame model cannot know, and what it reaches at best.

  Attributes:
    undecided: share of the captions of which it cannot tell whether they are
      true: they are false of a clip with the same middle frame.
    choice: how often the best of a caption and those that differ from it in
      reversed motions alone is true.
    motion: accuracy on the motion probes.
    retrieval: expected recall at 1, full captions against clips of the split,
      in either direction.
  """

  undecided: float
  choice: float
  motion: float
  retrieval: float


def one_frame(records: Sequence[dict[str, Any]]) -> OneFrame:
  """Scores the one-frame model on records of a split.

  Raises:
    ValueError: if a caption is not in the grammar.
  """
  undecided, choice, probed = [], [], []
  for record in records:
    worlds = language.reversals(record["objects"])
    for text in record["captions"]:
      truths = _truths(language.rivals(_parse(text)), worlds)
      undecided.append(not truths[0].all())
      choice.append(truths.mean(axis=1).max())
    for probe in record["motion"]:
      truths = _truths(
        [_parse(probe[key]) for key in ("true", "false")], worlds
      )
      decisive = truths[:, truths[0] != truths[1]]
      probed.append(decisive.mean(axis=1).max())
  middles = [record["image"][len(record["image"]) // 2] for record in records]
  return OneFrame(
    undecided=float(np.mean(undecided)),
    choice=float(np.mean(choice)),
    motion=float(np.mean(probed)),
    # Of n clips with the same middle frame, one is found.
    retrieval=len(set(middles)) / len(middles),
  )


def _parse(text: str) -> Meaning:
  meaning = language.parse(text)
  if meaning is None:
    raise ValueError(f"not a caption of scenes_video: {text!r}")
  return meaning


def _truths(
  meanings: Sequence[Meaning], worlds: Sequence[Sequence[Object]]
) -> np.ndarray:
  """Returns which meanings are true of which worlds, bool `[M, W]`."""
  return np.array(
    [
      [language.is_true(meaning, world) for world in worlds]
      for meaning in meanings
    ]
  )


def main(name: str = "scenes_video", split: str = "test") -> None:
  """Prints the scores of the one-frame model on a split as JSON."""
  from vlp_jax.data.builders import scenes_video

  records = scenes_video.records(scenes_video.ensure_built(name), split)
  scores = dataclasses.asdict(one_frame(records))
  print(json.dumps({k: round(v, 4) for k, v in scores.items()}))


if __name__ == "__main__":
  main(*sys.argv[1:])
