"""python -m vlp_jax.data.one_frame [--name=scenes_video] [--split=test]

Prints, as JSON, what is reached on clips of `scenes_video` with one frame.

A *one-frame model* knows everything that the middle frame of a clip shows, and
which kinds of motions its objects make, but not which way time runs. No model
of one frame knows more: the clips in which motions are reversed have the same
middle frame and are as likely (`motion_generate.py`). What is above its scores
says that a model sees motion.

  --name=NAME     scenes_video, or scenes_video/<config>
  --split=SPLIT   train, validation or test
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax import command
from vlp_jax.data import motion_language as language
from vlp_jax.data.builders import scenes_video
from vlp_jax.data.scenes_language import Meaning, Object
from vlp_jax.errors import UserError
from vlp_jax.flags import parse_only_flags

FLAGS = dict(name="scenes_video", split="test")


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
  undecided, choice, probes, clips = [], [], {}, set()
  for record in records:
    worlds = language.reversals(record["objects"])
    for text in record["captions"]:
      truths = _truths(language.rivals(_parse(text)), worlds)
      undecided.append(not truths[0].all())
      choice.append(truths.mean(axis=1).max())
    middle = record["image"][len(record["image"]) // 2]
    clips.add(middle)
    for probe in record["motion"]:
      asked = middle, frozenset(probe.values())
      probes.setdefault(asked, collections.Counter())[probe["true"]] += 1
  right = [max(answers.values()) for answers in probes.values()]
  return OneFrame(
    undecided=float(np.mean(undecided)),
    choice=float(np.mean(choice)),
    # Who sees and is asked the same twice gives the same answer.
    motion=sum(right) / sum(answers.total() for answers in probes.values()),
    retrieval=len(clips) / len(records),
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


def main(argv: Sequence[str]) -> None:
  """Reads the command line, and prints the scores.

  Raises:
    UserError: if there is no such data set or split.
  """
  flags = parse_only_flags(argv, FLAGS, __doc__)
  builder = scenes_video.ensure_built(flags["name"])
  if flags["split"] not in builder.info.splits:
    raise UserError(
      f"--split={flags['split']}: {flags['name']} has "
      + ", ".join(builder.info.splits)
    )
  scores = one_frame(scenes_video.records(builder, flags["split"]))
  rounded = {k: round(v, 4) for k, v in dataclasses.asdict(scores).items()}
  print(json.dumps(rounded))


if __name__ == "__main__":
  command.execute(main)
