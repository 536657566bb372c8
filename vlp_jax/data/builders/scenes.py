"""`scenes`: the embedded data set of pictures.

docs/scenes.md says what is in it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlp_jax.data import scenes_generate, scenes_language
from vlp_jax.data.builders import embedded

LANGUAGE = scenes_language


class Scenes(embedded.EmbeddedBuilder):
  """Builder of `scenes`: coloured shapes, captions, boxes and probes."""

  GENERATOR = scenes_generate
  DESCRIPTION = "Pictures of coloured shapes with captions that are true."
  ANNOTATIONS = ("objects", "phrases", "binding", "relation")
  BUILDER_CONFIGS = embedded.configs(scenes_generate)
  DEFAULT_BUILDER_CONFIG_NAME = embedded.EmbeddedBuilder.DEFAULT


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
    **embedded.told(example, Scenes.ANNOTATIONS),
  }


ensure_built = functools.partial(embedded.ensure_built, Scenes)
