"""What a source is made of before any picture is opened: entries.

Pass one of `prepare` turns every source into a stream of entries; pass two
opens their pictures. An entry says where its picture is, not what it holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vlp_jax.data import intake
from vlp_jax.data.clips import Data

# Rejections keep so many names of each reason.
_NAMED = 10


class Place(NamedTuple):
  """Where the bytes of a picture are.

  Attributes:
    file: relative to `folder`, or inside a tar.
    folder: that no path may leave; empty for a part of `file`.
    offset: of the first byte of a part.
    size: of a part; -1 is the whole file.
  """

  file: str
  folder: str = ""
  offset: int = 0
  size: int = -1

  def read(self, clips: bool = False) -> Data:
    """Returns the picture's bytes; of a clip also those of its frames.

    Raises:
      intake.Rejected: if the file is missing, elsewhere or unreadable.
    """
    if self.size < 0:
      read = intake.read_clip if clips else intake.read
      return read(pathlib.Path(self.folder), self.file)
    try:
      with open(self.file, "rb") as file:
        return os.pread(file.fileno(), self.size, self.offset)
    except OSError as e:
      raise intake.Rejected("unreadable file", e.strerror or "") from e


class Entry(NamedTuple):
  """A picture that a source lists, with clean captions.

  Attributes:
    name: what messages and reports call it.
    image_id: unique among pictures.
    split: canonical name, or "" where the source does not say.
    place: of the picture.
    captions: one or more.
    extra: the fields that are kept.
  """

  name: str
  image_id: str
  split: str
  place: Place
  captions: list[str]
  extra: dict[str, Any]

  def to_json(self) -> str:
    """Writes it as a line that `from_json` reads."""
    return json.dumps(self)  # a tuple: a list without names

  @classmethod
  def from_json(cls, text: str) -> Entry:
    """Reads what `to_json` wrote."""
    name, image_id, split, place, captions, extra = json.loads(text)
    return cls(name, image_id, split, Place(*place), captions, extra)


@dataclasses.dataclass
class Tally:
  """Counts of what was read, and of what was skipped by reason.

  Attributes:
    read: number of pictures or rows that the source lists.
    written: number of records.
    merged: number of rows that only added captions to another's picture.
    skipped: reason to (count, the first ten names).
    notes: the same of what was left out of records that are kept, such as one
      blank caption of three.
  """

  read: int = 0
  written: int = 0
  merged: int = 0
  skipped: dict[str, tuple[int, list[str]]] = dataclasses.field(
    default_factory=dict
  )
  notes: dict[str, tuple[int, list[str]]] = dataclasses.field(
    default_factory=dict
  )

  def skip(self, name: str, reason: str) -> None:
    """Counts what is skipped."""
    _count(self.skipped, reason, 1, [name])

  def note(self, name: str, reason: str) -> None:
    """Counts what is left out of a record that is kept."""
    _count(self.notes, reason, 1, [name])

  def add(self, other: Tally) -> None:
    """Adds another one's counts."""
    self.read += other.read
    self.written += other.written
    self.merged += other.merged
    for reason, (count, names) in other.skipped.items():
      _count(self.skipped, reason, count, names)
    for reason, (count, names) in other.notes.items():
      _count(self.notes, reason, count, names)

  def copy(self) -> Tally:
    """Returns an equal one."""
    same = Tally()
    same.add(self)
    return same

  @property
  def num_skipped(self) -> int:
    """Number of pictures or rows that were skipped, of all reasons."""
    return sum(count for count, _ in self.skipped.values())

  def by_count(self) -> list[tuple[str, int, list[str]]]:
    """Returns (reason, count, first names), the most frequent first."""
    rows = [(r, count, names) for r, (count, names) in self.skipped.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def _count(
  counts: dict[str, tuple[int, list[str]]],
  reason: str,
  number: int,
  names: Iterable[str],
) -> None:
  count, kept = counts.get(reason, (0, []))
  counts[reason] = count + number, [*kept, *names][:_NAMED]


def clean_captions(values: Sequence[Any], name: str, tally: Tally) -> list[str]:
  """Returns the usable captions, each once; notes the others.

  Raises:
    intake.Rejected: if none is usable, with the first one's reason.
  """
  kept: list[str] = []
  refused: list[intake.Rejected] = []
  for value in values:
    try:
      text = intake.caption(value)
    except intake.Rejected as e:
      refused.append(e)
    else:
      if text not in kept:
        kept.append(text)
  if not kept:
    raise refused[0] if refused else intake.Rejected("empty caption", "none")
  for e in refused:
    tally.note(name, e.reason)
  return kept


def text_id(value: Any) -> str:
  """Returns an id as text that UTF-8 can hold."""
  return str(value).encode("utf-8", "backslashreplace").decode()
