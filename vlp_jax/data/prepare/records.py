"""From an entry to a record on disk: the part that opens pictures.

The same functions serve one machine's processes and Apache Beam's workers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.prepare.entries import Entry


@dataclasses.dataclass(frozen=True)
class Schema:
  """What a record is made of.

  Attributes:
    min_side: least side of a picture in pixels.
    image_size: shorter side that larger pictures are reduced to; 0 = none.
    num_frames: so many frames of a clip are kept; 0 = records are pictures.
    kinds: of the fields that are kept: `int`, `float`, `text`, `texts` (a
      list) or `json` (all else, as text).
  """

  min_side: int = intake.MIN_SIDE
  image_size: int = 0
  num_frames: int = 0
  kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def features(self) -> tfds.features.FeaturesDict:
    """Returns TFDS's description of a record."""
    extra = {name: _FEATURES[kind]() for name, kind in self.kinds.items()}
    image = tfds.features.Image(shape=(None, None, 3))
    if self.num_frames:
      images = {"frames": tfds.features.Sequence(image)}
    else:
      images = {"image": image}
    return tfds.features.FeaturesDict(
      {
        **images,
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "image_id": tfds.features.Text(),
        **extra,
      }
    )

  def record(self, entry: Entry) -> dict[str, Any]:
    """Reads and checks an entry's picture, and returns the record.

    Raises:
      intake.Rejected: if it cannot be used.
    """
    data = entry.place.read(clips=self.num_frames > 0)
    limits = self.min_side, self.image_size
    if self.num_frames:
      images = {"frames": intake.frames(data, self.num_frames, *limits)}
    else:
      images = {"image": intake.picture(data, *limits)}
    return {
      **images,
      "captions": entry.captions,
      "image_id": entry.image_id,
      **{k: _stored(entry.extra.get(k), v) for k, v in self.kinds.items()},
    }


class Kinds:
  """Finds out what kind of value each field that is kept has."""

  def __init__(self, names: tuple[str, ...]):
    self._seen: dict[str, set[str]] = {name: set() for name in names}

  def look(self, entry: Entry) -> None:
    """Takes note of an entry's fields."""
    for name, value in entry.extra.items():
      if value is not None:
        self._seen[name].add(_kind(value))

  def found(self) -> dict[str, str]:
    """Returns each field's kind; of several that do not agree, `json`."""
    return {name: _common(kinds) for name, kinds in self._seen.items()}


def _kind(value: Any) -> str:
  if isinstance(value, bool | int):
    return "int" if -(2**63) <= value < 2**63 else "json"
  if isinstance(value, float):
    return "float"
  if isinstance(value, str):
    return "text"
  if isinstance(value, list) and all(isinstance(v, str) for v in value):
    return "texts"
  return "json"


def _common(kinds: set[str]) -> str:
  if kinds == {"int", "float"}:
    return "float"
  return kinds.copy().pop() if len(kinds) == 1 else "json"


def _stored(value: Any, kind: str) -> Any:
  if value is None:
    return {"int": -1, "float": np.nan, "texts": []}.get(kind, "")
  if kind == "text":
    return _utf8(value)
  if kind == "texts":
    return [_utf8(v) for v in value]
  return json.dumps(value) if kind == "json" else value


def _utf8(text: str) -> str:
  return text.encode("utf-8", "backslashreplace").decode()


_FEATURES = {
  "int": lambda: tfds.features.Scalar(np.int64),
  "float": lambda: tfds.features.Scalar(np.float64),
  "text": tfds.features.Text,
  "texts": lambda: tfds.features.Sequence(tfds.features.Text()),
  "json": tfds.features.Text,
}
