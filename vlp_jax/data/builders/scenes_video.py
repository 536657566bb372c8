"""`scenes_video`: the embedded data set of clips.

docs/scenes.md says what is in it. A clip is its frames, each a PNG.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlp_jax.data import motion_generate, motion_language, tfds_fields
from vlp_jax.data.builders import embedded

LANGUAGE = motion_language


class ScenesVideo(embedded.EmbeddedBuilder):
  """Builder of `scenes_video`: moving shapes, captions, boxes and probes."""

  GENERATOR = motion_generate
  UNIT = "clips"
  PICTURES = "frames"
  DESCRIPTION = "Clips of shapes that move, with captions that are true."
  ANNOTATIONS = ("objects", "motion", "binding")
  BUILDER_CONFIGS = embedded.configs(motion_generate)
  DEFAULT_BUILDER_CONFIG_NAME = embedded.EmbeddedBuilder.DEFAULT


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
    **embedded.told(example, ScenesVideo.ANNOTATIONS),
  }


ensure_built = functools.partial(embedded.ensure_built, ScenesVideo)


def records(builder: ScenesVideo, split: str) -> list[dict[str, Any]]:
  """Returns all records of a split."""
  source = builder.as_data_source(
    split, decoders={"frames": tfds_fields.SkipDecoding()}
  )
  return [to_record(example) for example in source]
