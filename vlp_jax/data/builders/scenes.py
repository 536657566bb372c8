"""`scenes`: the embedded data set of pictures.

docs/scenes.md says what is in it. Annotations are kept as JSON texts: they are
written, and above all read, more than twice as fast as nested TFDS sequences.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import scenes_generate, scenes_language
from vlp_jax.data.builders import embedded

LANGUAGE = scenes_language
_ANNOTATIONS = ("objects", "phrases", "binding", "relation")


class Scenes(embedded.EmbeddedBuilder):
  """Builder of `scenes`: coloured shapes, captions, boxes and probes."""

  GENERATOR = scenes_generate
  BUILDER_CONFIGS = embedded.configs(scenes_generate)
  DEFAULT_BUILDER_CONFIG_NAME = embedded.EmbeddedBuilder.DEFAULT

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.spec.image_size
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description="Pictures of coloured shapes with captions that are true.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(size, size, 3), encoding_format="png"
          ),
          "image_id": np.int32,
          "captions": tfds.features.Sequence(text()),
          **{
            name: text(doc="JSON, see docs/scenes.md") for name in _ANNOTATIONS
          },
        }
      ),
      disable_shuffling=True,  # examples are independent draws already
    )

  @staticmethod
  def to_features(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turns an example of `scenes_generate` into what TFDS stores."""
    texts = {name: json.dumps(example[name]) for name in _ANNOTATIONS}
    return {**example, **texts}


def to_record(example: Mapping[str, Any]) -> dict[str, Any]:
  """Turns an example that TFDS has read into a record.

  Args:
    example: from `builder.as_data_source(split, decoders={"image":
      tfds.decode.SkipDecoding()})`.

  Returns:
    `image` (PNG bytes), `image_id` (int), `captions` (list of str), `objects`,
    `phrases`, `binding` and `relation` (lists of dicts, see docs/scenes.md).
  """
  return {
    "image": example["image"],
    "image_id": int(example["image_id"]),
    "captions": [caption.decode() for caption in example["captions"]],
    **{name: json.loads(example[name]) for name in _ANNOTATIONS},
  }


ensure_built = functools.partial(embedded.ensure_built, Scenes)
