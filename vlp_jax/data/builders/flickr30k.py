"""Flickr30k (Young et al., 2014) in Karpathy's split (2015).

29,000 pictures to train, 1,014 to validate, 1,000 to test; five captions each.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data.builders import manual
from vlp_jax.data.builders.coco_captions import KARPATHY
from vlp_jax.data.prepare.entries import Tally

FLICKR = "https://shannon.cs.illinois.edu/DenotationGraph/"
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Flickr30k(manual.ManualBuilder, skip_registration=True):
  """Builder of `flickr30k`."""

  name = "flickr30k"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"the folder flickr30k-images of the archive from {FLICKR}, and "
    f"dataset_flickr30k.json from {KARPATHY}"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Flickr30k with captions, Karpathy's split.",
      homepage=FLICKR,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          # Karpathy's number. Flickr's own is over 2^31 for many.
          "image_id": np.int64,
          "flickr_id": np.int64,
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    listing, images = manual.require(
      folder,
      [("dataset_flickr30k.json", KARPATHY), ("flickr30k-images", FLICKR)],
    )
    rows: dict[str, list[manual.Row]] = {s: [] for s in _SPLITS.values()}
    for number, image in enumerate(manual.load(listing, "images")):
      split = _SPLITS.get(image.get("split"))
      if split:
        rows[split].append((image.get("filename", f"image {number}"), image))
    make = functools.partial(_example, manual.Pictures(images))
    return {split: manual.Split(found, make) for split, found in rows.items()}


def _example(
  pictures: manual.Pictures, name: str, image: Mapping[str, Any], tally: Tally
) -> dict[str, Any]:
  return {
    "image": pictures.read(image["filename"]),
    "captions": manual.captions(
      [sentence["raw"] for sentence in image["sentences"]], name, tally
    ),
    "image_id": int(image["imgid"]),
    "flickr_id": int(image["filename"].partition(".")[0]),
  }


BUILDERS = {"flickr30k": Flickr30k}
