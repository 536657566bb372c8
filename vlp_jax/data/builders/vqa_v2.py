"""VQA v2 (Goyal et al., 2017): questions about COCO pictures, ten answers each.

443,757 questions to train, 214,354 to validate. Those of `test` (447,793; made
where their list is) have no answers. `labels` and `scores` are what a
classifier over `answers.json` learns, which is written beside the data; a few
questions have none of these answers, but count when accuracy is measured.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual, vqa_answers
from vlp_jax.data.builders.coco_captions import COCO
from vlp_jax.data.prepare.entries import Tally

_SOURCE = "https://visualqa.org/download.html"
_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
_SPLITS = {"train": "train2014", "validation": "val2014"}
_TEST = "test2015"


class Answered(NamedTuple):
  """What is known of a question's answer.

  Attributes:
    answers: of ten people.
    majority: the most frequent one.
    answer_type: `yes/no`, `number` or `other`.
  """

  answers: tuple[str, ...] = ()
  majority: str = ""
  answer_type: str = ""


class VqaV2(manual.ManualBuilder, skip_registration=True):
  """Builder of `vqa_v2`: a record is a question."""

  name = "vqa_v2"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"train2014.zip and val2014.zip from {COCO}, unpacked or not, and the "
    f"questions and annotations of Balanced Real Images from {_SOURCE}, "
    f"unpacked; for the split test, test2015.zip and its questions, too"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description="VQA v2: questions about COCO pictures.",
      homepage="https://visualqa.org",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "image_id": np.int64,
          "question": text(),
          "question_id": np.int64,
          "answers": tfds.features.Sequence(text()),
          "answer_type": text(),
          "labels": tfds.features.Sequence(np.int64),
          "scores": tfds.features.Sequence(np.float32),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    parts = dict(_SPLITS)
    if (folder / _QUESTIONS.format(_TEST)).exists():
      parts["test"] = _TEST
    wanted = [(part, f"{part}.zip", COCO) for part in parts.values()]
    for part in parts.values():
      wanted.append((_QUESTIONS.format(part), _SOURCE))
      if part != _TEST:
        wanted.append((_ANNOTATIONS.format(part), _SOURCE))
    pictures = dict(zip(parts, manual.require(folder, wanted), strict=False))

    answered = {
      part: _answered(folder / _ANNOTATIONS.format(part))
      for part in _SPLITS.values()
    }
    vocabulary = vqa_answers.vocabulary(
      a.majority
      for a in itertools.chain(*(part.values() for part in answered.values()))
    )
    self.write_beside("answers.json", vocabulary)
    labels = {answer: label for label, answer in enumerate(vocabulary)}
    return {
      split: manual.Split(
        _rows(folder / _QUESTIONS.format(part)),
        functools.partial(
          _example,
          manual.Pictures(pictures[split]),
          part,
          answered.get(part),
          labels,
        ),
      )
      for split, part in parts.items()
    }


def _rows(path: pathlib.Path) -> Iterator[manual.Row]:
  for number, row in enumerate(manual.load(path, "questions")):
    yield f"question {row.get('question_id', f'number {number}')}", row


def _answered(path: pathlib.Path) -> dict[int, Answered]:
  """Returns what annotations say, by the questions' ids.

  Six million answers take little room if equal ones are one string.
  """
  return {
    row["question_id"]: Answered(
      tuple(sys.intern(answer["answer"]) for answer in row["answers"]),
      row["multiple_choice_answer"],
      sys.intern(row["answer_type"]),
    )
    for row in manual.load(path, "annotations")
  }


def _example(
  pictures: manual.Pictures,
  part: str,
  answered: Mapping[int, Answered] | None,
  labels: dict[str, int],
  name: str,
  row: Mapping[str, Any],
  tally: Tally,
) -> dict[str, Any]:
  del name, tally
  found = Answered()
  if answered is not None:
    if row["question_id"] not in answered:
      raise intake.Rejected("no annotation")
    found = answered[row["question_id"]]
  known, scores = vqa_answers.soft_scores(found.answers, labels)
  return {
    "image": pictures.read(f"COCO_{part}_{int(row['image_id']):012d}.jpg"),
    "image_id": int(row["image_id"]),
    "question": intake.caption(row["question"]),
    "question_id": int(row["question_id"]),
    "answers": list(found.answers),
    "answer_type": found.answer_type,
    "labels": known,
    "scores": scores,
  }


BUILDERS = {"vqa_v2": VqaV2}
