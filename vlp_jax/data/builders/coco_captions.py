"""COCO captions (Chen et al., 2015) in Karpathy's split (2015).

Train has 113,287 pictures, `restval` among them; validation and test have
5,000 each. Pictures have five captions or a few more.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data.builders import manual
from vlp_jax.data.prepare.entries import Tally

COCO = "https://cocodataset.org/#download"
KARPATHY = (
  "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
)
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class CocoCaptions(manual.ManualBuilder, skip_registration=True):
  """Builder of `coco_captions` and `coco_captions/no_restval`."""

  # TFDS has a coco_captions/2014:1.1.0, and takes the name without a
  # configuration as coco_captions/2014: so that is ours, too, and newer.
  VERSION = tfds.core.Version("2.0.0")
  BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's protocol
    tfds.core.BuilderConfig(
      name="2014", description="Train includes restval: 113,287 pictures."
    ),
    tfds.core.BuilderConfig(
      name="no_restval", description="Train is train2014: 82,783 pictures."
    ),
  ]
  DEFAULT_BUILDER_CONFIG_NAME = "2014"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"train2014.zip and val2014.zip from {COCO}, unpacked or not, and "
    f"dataset_coco.json from {KARPATHY}"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="COCO 2014 with captions, Karpathy's split.",
      homepage="https://cocodataset.org",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": np.int64,
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    listing, train, val = manual.require(
      folder,
      [
        ("dataset_coco.json", KARPATHY),
        ("train2014", "train2014.zip", COCO),
        ("val2014", "val2014.zip", COCO),
      ],
    )
    pictures = {
      "train2014": manual.Pictures(train),
      "val2014": manual.Pictures(val),
    }
    splits = dict(_SPLITS)
    if self.builder_config.name != "no_restval":
      splits["restval"] = "train"
    rows: dict[str, list[manual.Row]] = {s: [] for s in _SPLITS.values()}
    for number, image in enumerate(manual.load(listing, "images")):
      split = splits.get(image.get("split"))
      if split:
        rows[split].append((image.get("filename", f"image {number}"), image))
    make = functools.partial(_example, pictures)
    return {split: manual.Split(found, make) for split, found in rows.items()}


def _example(
  pictures: Mapping[str, manual.Pictures],
  name: str,
  image: Mapping[str, Any],
  tally: Tally,
) -> dict[str, Any]:
  return {
    "image": pictures[image["filepath"]].read(image["filename"]),
    "captions": manual.captions(
      [sentence["raw"] for sentence in image["sentences"]], name, tally
    ),
    "image_id": int(image["cocoid"]),
  }


BUILDERS = {
  "coco_captions": CocoCaptions,
  "coco_captions/no_restval": functools.partial(
    CocoCaptions, config="no_restval"
  ),
}
