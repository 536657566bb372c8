"""Visual Genome (Krishna et al., 2017): pictures with described regions.

The descriptions are captions of the whole picture, each text once. With their
boxes they are kept in `phrases`, JSON as in `scenes` (docs/scenes.md). All
108,077 pictures are in `train`; `coco_id` tells those that COCO has, too,
whose test set must not be trained on.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.prepare.entries import Tally

_SOURCE = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
_FOLDERS = ("VG_100K", "VG_100K_2")


class VisualGenome(manual.ManualBuilder, skip_registration=True):
  """Builder of `visual_genome`."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "the folders VG_100K and VG_100K_2 of images.zip and images2.zip, "
    f"region_descriptions.json and image_data.json, all from {_SOURCE}"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Visual Genome with its region descriptions.",
      homepage=_SOURCE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": np.int64,
          "coco_id": np.int64,  # -1: not in COCO
          "phrases": tfds.features.Text(doc="JSON, see docs/scenes.md"),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    names = ("region_descriptions.json", "image_data.json", *_FOLDERS)
    regions, images, *folders = manual.require(
      folder, [(name, _SOURCE) for name in names]
    )
    info = {
      row.get("image_id", row.get("id")): row for row in manual.load(images)
    }
    make = functools.partial(_example, [manual.Pictures(f) for f in folders])
    return {"train": manual.Split(_rows(regions, info), make)}


def _rows(
  path: pathlib.Path, info: Mapping[int, Mapping[str, Any]]
) -> Iterator[manual.Row]:
  """Yields pictures with their regions and what image_data.json has."""
  for number, image in enumerate(manual.load(path)):
    regions = image.get("regions", [])
    # The files have `id`; their description says `image_id`.
    image_id = image.get("id", image.get("image_id", number))
    about = info.get(image_id, {})
    yield f"{image_id}.jpg", {**about, "image_id": image_id, "regions": regions}


def _example(
  folders: list[manual.Pictures],
  name: str,
  row: Mapping[str, Any],
  tally: Tally,
) -> dict[str, Any]:
  phrases = []
  for region in row["regions"]:
    try:
      text = intake.caption(region["phrase"])
      box = _box(region, row["width"], row["height"])
      phrases.append({"text": text, "bbox": box})
    except intake.Rejected as e:
      tally.note(f"{name} region {region.get('region_id')}", e.reason)
  if not phrases:
    raise intake.Rejected("no usable caption")
  return {
    "image": _read(folders, name),
    "captions": list(dict.fromkeys(phrase["text"] for phrase in phrases)),
    "image_id": row["image_id"],
    "coco_id": -1 if row.get("coco_id") is None else row["coco_id"],
    "phrases": json.dumps(phrases),
  }


def _box(region: Mapping[str, Any], width: int, height: int) -> list[float]:
  """Returns [x0, y0, x1, y1] as fractions of the picture, inside it."""
  x, y = region["x"], region["y"]
  box = [x, y, x + region["width"], y + region["height"]]
  box = [
    min(max(edge / size, 0.0), 1.0)
    for edge, size in zip(box, (width, height) * 2, strict=True)
  ]
  if box[0] >= box[2] or box[1] >= box[3]:
    raise intake.Rejected("empty box")
  return [round(edge, 5) for edge in box]


def _read(folders: list[manual.Pictures], name: str) -> bytes:
  """Reads a picture from the folder that has it."""
  *others, last = folders
  for folder in others:
    try:
      return folder.read(name)
    except intake.Rejected as e:
      if e.reason != "missing file":
        raise
  return last.read(name)


BUILDERS = {"visual_genome": VisualGenome}
