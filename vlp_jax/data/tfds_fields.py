"""Which features of a TFDS data set are the picture, or clip, and the caption.

TFDS stores an example as a flat map from paths such as `captions/text` to
values. Reading just the few that are needed from it is several times faster
than TFDS's decoding of whole examples (20 against 100-400 us).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vlp_jax.errors import UserError

# What caption features are called, the likeliest first.
_CAPTION_NAMES = ("caption", "text", "sentence", "description", "title")
_ID_PATHS = ("image_id", "image/id", "id")
# What features with the bytes of a clip's file are called.
_FILE_NAMES = ("video", "clip")
_LABEL_PATHS = ("label", "category", "refs")
_NO_LABEL = ("", -1)  # as they are stored where a record has none


class SkipDecoding(tfds.decode.SkipDecoding):
  """TFDS's, for sequences as well."""

  def decode_batch_example_np(self, example_data):
    """Returns what is stored."""
    return example_data


@dataclasses.dataclass(frozen=True)
class Fields:
  """The paths of what a record is made of.

  Attributes:
    image: of the encoded picture, or of a clip: its file, or its frames.
    caption: of the caption or captions.
    image_id: of an integer, or "" if there is none.
    labels: of scalar annotations that are kept where a record has them.
    has_frames: whether `image` is the frames of a clip.
  """

  image: str
  caption: str
  image_id: str = ""
  labels: tuple[str, ...] = ()
  has_frames: bool = False

  def read(self, data: bytes, index: int) -> dict[str, Any]:
    """Returns the record in a serialised example.

    Args:
      data: the example's protocol buffer.
      index: the image_id where the data set has none.
    """
    values = tf_example_pb2.Example.FromString(data).features.feature
    captions = values[self.caption].bytes_list.value
    if self.image_id:
      index = values[self.image_id].int64_list.value[0] & 0x7FFFFFFF
    images = list(values[self.image].bytes_list.value)
    record = {
      "image": images if self.has_frames else next(iter(images), b""),
      "captions": [c.decode("utf-8", "replace") for c in captions],
      "image_id": index,
    }
    for path in self.labels:
      texts = values[path].bytes_list.value
      label = (
        texts[0].decode("utf-8", "replace")
        if texts
        else int(values[path].int64_list.value[0])
      )
      if label not in _NO_LABEL:
        record[path] = label
    return record


def find(
  features: tfds.features.FeaturesDict,
  name: str,
  image_key: str = "",
  caption_key: str = "",
  clips: bool = False,
) -> Fields:
  """Finds the picture and the caption among features, by their types.

  Of clips, frames are preferred to a file, and a file to a picture.

  Args:
    features: of the data set.
    name: of the data set, for messages.
    image_key: path of the picture's feature, if it is to be told.
    caption_key: path of the captions' feature, such as `captions/text`.
    clips: whether to find clips.

  Raises:
    UserError: if one is missing or ambiguous; the message lists the features.
  """
  leaves = list(_leaves(features))
  images = [p for p, f, depth in leaves if _is_image(f) and depth == 0]
  frames = [p for p, f, depth in leaves if _is_image(f) and depth == 1]
  files = [p for p, f, _ in leaves if p in _FILE_NAMES and _is_text(f)]
  likely = images
  if clips:
    likely = frames or files or images
    images = [*frames, *files, *images]
  texts = [p for p, f, depth in leaves if _is_text(f) and depth <= 1]
  integers = [
    p
    for p, f, depth in leaves
    if depth == 0
    and f.shape == ()
    and np.issubdtype(f.np_dtype, np.integer)
    and not isinstance(f, tfds.features.ClassLabel)
  ]
  scalars = {p for p, _, depth in leaves if depth == 0} & {*texts, *integers}
  scalars |= {
    p for p, f, _ in leaves if isinstance(f, tfds.features.ClassLabel)
  }
  listing = f"its features are {_listing(leaves)}"
  if not clips and (frames or files):
    listing += "; for its clips, set --config.data.num_frames"
  caption = _choose(
    "caption_key", caption_key, texts, _likeliest(texts), name, listing
  )
  image = _choose("image_key", image_key, images, likely, name, listing)
  return Fields(
    image=image,
    caption=caption,
    image_id=next((p for p in _ID_PATHS if p in integers), ""),
    labels=tuple(p for p in _LABEL_PATHS if p in scalars and p != caption),
    has_frames=image in frames,
  )


def _choose(
  field: str,
  key: str,
  candidates: Sequence[str],
  likely: Sequence[str],
  name: str,
  listing: str,
) -> str:
  kind = {"image_key": "Image", "caption_key": "Text"}[field]
  if key:
    if key not in candidates:
      raise UserError(
        f"data.{field}={key}: {name} has no such {kind} feature; {listing}"
      )
    return key
  if len(likely) != 1:
    what = "several" if likely else "no"
    raise UserError(
      f"data set {name} has {what} {kind} features that may be meant; "
      f"set --config.data.{field}; {listing}"
    )
  return likely[0]


def _likeliest(texts: Sequence[str]) -> list[str]:
  """Returns the texts that are captions by their names, or else all."""
  if len(texts) > 1:
    for word in _CAPTION_NAMES:
      named = [path for path in texts if word in path.lower()]
      if named:
        return named
  return list(texts)


def _leaves(
  feature: Any, path: str = "", depth: int = 0
) -> Iterator[tuple[str, Any, int]]:
  """Yields (path, feature, number of enclosing sequences)."""
  if isinstance(feature, tfds.features.FeaturesDict):
    for key, value in feature.items():
      yield from _leaves(value, f"{path}/{key}" if path else key, depth)
  elif isinstance(feature, tfds.features.Sequence):
    yield from _leaves(feature.feature, path, depth + 1)
  elif isinstance(feature, tfds.features.FeatureConnector):
    yield path, feature, depth


def _is_image(feature: Any) -> bool:
  return isinstance(feature, tfds.features.Image)


def _is_text(feature: Any) -> bool:
  return feature.shape == () and feature.np_dtype == np.object_


def _listing(leaves: Sequence[tuple[str, Any, int]]) -> str:
  def describe(feature: Any, depth: int) -> str:
    kind = "Text" if _is_text(feature) else type(feature).__name__
    return "Sequence(" * depth + kind + ")" * depth

  return ", ".join(f"{p}: {describe(f, d)}" for p, f, d in leaves)
