"""Which words of a caption name what, and where that is in each frame."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from vlp_jax.data import clips

Box = Sequence[float]


class Phrase(NamedTuple):
  """Words of a caption that name something.

  Attributes:
    text: the words.
    start: place of the first letter in the caption.
    frames: for each frame, the boxes (x0, y0, x1, y1, as fractions) of what
      the words fit; a picture has one frame.
  """

  text: str
  start: int
  frames: list[list[Box]]


def phrases(
  language: ModuleType,
  caption: str,
  objects: Sequence[dict[str, Any]],
  num_frames: int = 0,
) -> list[Phrase]:
  """Finds the terms of a caption, and the objects that they fit.

  Args:
    language: of the caption and the objects; see `sources.Source`.
    caption: its words one space apart; one that is not in the language has no
      terms.
    objects: of the picture or the clip.
    num_frames: of a clip, as many as are shown; 0 of a picture.
  """
  meaning = language.parse(caption)
  found, at = [], 0
  for term in meaning.terms if meaning else ():
    start = caption.index(str(term), at)
    at = start + len(str(term))
    tracks = [_track(o, num_frames) for o in objects if term.fits(o)]
    if not tracks:
      continue
    frames = [[b for b in boxes if b] for boxes in zip(*tracks, strict=True)]
    found.append(Phrase(str(term), start, frames))
  return found


def _track(thing: dict[str, Any], num_frames: int) -> list[Box | None]:
  """Returns an object's box in each frame; None where it is not there."""
  if not num_frames:
    return [thing["bbox"]]
  boxes = thing["boxes"]
  return [boxes[place] for place in clips.places(len(boxes), num_frames)]
