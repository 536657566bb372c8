"""Answers of VQA v2: how they are normalised, the vocabulary, soft scores.

The rules are those of the official evaluation (Antol et al., 2015), so that
answers that it takes as equal are one label here.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

MIN_COUNT = 9  # of a majority answer; with train and val, 3,129 are left

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMERAL_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_TO_TEN.split())}
_NUMBERS["none"] = "0"
_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
  it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
  not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've 'twas
  wasn't we'd've we've weren't what'll what're what's what've when's where'd
  where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
  you're you've
"""


def _slips() -> dict[str, str]:
  """Returns the contractions with one apostrophe left out, and what is meant.

  As in the official table, `somebody'd` is the one that goes the other way.
  """
  slips = {"somebody'd": "somebodyd"}
  for word in _CONTRACTED.split():
    for at in (i for i, letter in enumerate(word) if letter == "'"):
      slips[word[:at] + word[at + 1 :]] = word
  return slips


_SLIPS = _slips()


def normalise(answer: str) -> str:
  """Returns an answer as the official evaluation compares it.

  Lower case; no punctuation (a blank in its place inside a word, as in
  `t-shirt`, unless a number such as 1,000 is near); no full stops but decimal
  points; digits for `none` and the numbers to ten; no articles; apostrophes
  where they are missing.
  """
  text = raw = answer.replace("\n", " ").replace("\t", " ").strip()
  has_numeral = bool(_NUMERAL_COMMA.search(raw))
  for mark in _PUNCTUATION:
    at_edge = f"{mark} " in raw or f" {mark}" in raw
    text = text.replace(mark, "" if at_edge or has_numeral else " ")
  words = _FULL_STOP.sub("", text).lower().split()
  words = [_NUMBERS.get(word, word) for word in words]
  words = [word for word in words if word not in _ARTICLES]
  return " ".join(_SLIPS.get(word, word) for word in words)


def vocabulary(
  majority_answers: Iterable[str], min_count: int = MIN_COUNT
) -> list[str]:
  """Returns the frequent answers; their places are the labels.

  Args:
    majority_answers: of all questions, those of train before those of val:
      answers are in the order in which they first occur, as published
      checkpoints have them.
    min_count: how often an answer has to occur.
  """
  counts = collections.Counter(map(normalise, majority_answers))
  return [answer for answer, count in counts.items() if count >= min_count]


def soft_scores(
  answers: Sequence[str], labels: dict[str, int]
) -> tuple[list[int], list[float]]:
  """Returns the labels among a question's answers, and their scores.

  A score is the official accuracy of the answer: 0.3, 0.6, 0.9 or 1, if one,
  two, three or more of ten people gave it.

  Args:
    answers: the ten.
    labels: of the vocabulary's answers.
  """
  counts = collections.Counter(map(normalise, answers))
  known = [answer for answer in counts if answer in labels]
  scores = [min(1.0, round(0.3 * counts[answer], 1)) for answer in known]
  return [labels[answer] for answer in known], scores
