"""What builders of clips with captions have in common.

A record is a clip's file, byte for byte, with its captions. It is opened, and
its first and last frame are decoded, to see that it is whole.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.errors import UserError


class Clip(NamedTuple):
  """What a list says of a clip.

  Attributes:
    file: path in the folder of clips.
    captions: as the list has them.
  """

  file: str
  captions: Sequence[Any]


class VideoBuilder(manual.ManualBuilder, skip_registration=True):
  """Base of builders whose records are `video`, `captions` and `video_id`.

  Attributes:
    SOURCE: the owners' page.
  """

  SOURCE = ""

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.name}: clips with captions.",
      homepage=self.SOURCE,
      features=tfds.features.FeaturesDict(
        {
          "video": text(doc="the clip's file: bytes, no text"),
          "captions": tfds.features.Sequence(text()),
          "video_id": text(),
        }
      ),
    )


def split(folder: pathlib.Path, clips: Mapping[str, Clip]) -> manual.Split:
  """Returns a split of the clips of a folder, by their ids."""

  def make(video_id: str, clip: Clip, tally: Tally) -> dict[str, Any]:
    return {
      "video": intake.clip(intake.read(folder, clip.file)),
      "captions": manual.captions(clip.captions, video_id, tally),
      "video_id": video_id,
    }

  return manual.Split(clips.items(), make)


def table(
  path: pathlib.Path, wanted: Sequence[str]
) -> Iterator[dict[str, str]]:
  """Yields the rows of a CSV file with a line of column names.

  Raises:
    UserError: if a column is missing, or the file is not UTF-8.
  """
  try:
    with path.open(encoding="utf-8-sig", newline="") as file:
      rows = csv.DictReader(file, restval="")
      missing = [c for c in wanted if c not in (rows.fieldnames or ())]
      if missing:
        raise UserError(
          f"{path}: no column {', '.join(missing)}; is it the right file?"
        )
      yield from rows
  except (UnicodeDecodeError, csv.Error) as e:
    raise UserError(f"{path}: not CSV in UTF-8 ({e}); get it again") from e
