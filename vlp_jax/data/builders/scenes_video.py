"""`scenes_video`: the embedded data set of clips.

docs/scenes.md says what is in it. A clip is its frames, each a PNG.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import motion_generate, motion_language, tfds_fields
from vlp_jax.data.builders import embedded

LANGUAGE = motion_language
_ANNOTATIONS = ("objects", "motion", "binding")


class ScenesVideo(embedded.EmbeddedBuilder):
  """Builder of `scenes_video`: moving shapes, captions, boxes and probes."""

  GENERATOR = motion_generate
  UNIT = "clips"
  BUILDER_CONFIGS = embedded.configs(motion_generate)
  DEFAULT_BUILDER_CONFIG_NAME = embedded.EmbeddedBuilder.DEFAULT

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.spec.image_size
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description="Clips of shapes that move, with captions that are true.",
      features=tfds.features.FeaturesDict(
        {
          "frames": tfds.features.Sequence(
            tfds.features.Image(shape=(size, size, 3), encoding_format="png")
          ),
          "image_id": np.int32,
          "captions": tfds.features.Sequence(text()),
          **{
            name: text(doc="JSON, see docs/scenes.md") for name in _ANNOTATIONS
          },
        }
      ),
      disable_shuffling=True,  # pairs of clips are independent draws already
    )

  @staticmethod
  def to_features(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turns an example of `motion_generate` into what TFDS stores."""
    texts = {name: json.dumps(example[name]) for name in _ANNOTATIONS}
    kept = {name: example[name] for name in ("image_id", "captions")}
    return {"frames": example["image"], **kept, **texts}


def to_record(example: Mapping[str, Any]) -> dict[str, Any]:
  """Turns an example that TFDS has read into a record.

  Args:
    example: from `builder.as_data_source(split, decoders={"frames":
      tfds_fields.SkipDecoding()})`.

  Returns:
    `image` (the frames, a list of PNG bytes), `image_id` (int), `captions`
    (list of str), `objects`, `motion` and `binding` (lists of dicts, see
    docs/scenes.md).
  """
  return {
    "image": [bytes(frame) for frame in example["frames"]],
    "image_id": int(example["image_id"]),
    "captions": [caption.decode() for caption in example["captions"]],
    **{name: json.loads(example[name]) for name in _ANNOTATIONS},
  }


ensure_built = functools.partial(embedded.ensure_built, ScenesVideo)


def records(builder: ScenesVideo, split: str) -> list[dict[str, Any]]:
  """Returns all records of a split."""
  source = builder.as_data_source(
    split, decoders={"frames": tfds_fields.SkipDecoding()}
  )
  return [to_record(example) for example in source]
