"""NLVR2 (Suhr et al., 2019): is a sentence true of two photographs?

86,373 examples to train, 6,982 to validate (dev), 6,967 to test (test1); 6,970
more in `test2`, the former hidden test set, where its pictures are there.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.prepare.entries import Tally

_SOURCE = "https://github.com/lil-lab/nlvr/tree/master/nlvr2"
# split: its list, and the folder of its pictures
_SPLITS = {
  "train": ("train", "images/train"),
  "validation": ("dev", "dev"),
  "test": ("test1", "test1"),
}
_HIDDEN = {"test2": ("test2", "test2")}


class Nlvr2(manual.ManualBuilder, skip_registration=True):
  """Builder of `nlvr2`: a record is a sentence with its two pictures."""

  name = "nlvr2"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "train.json, dev.json and test1.json (or the repository's nlvr2/data), and "
    "the unpacked pictures in images/train/0 to 99, dev and test1; "
    f"{_SOURCE} has the lists, and says how to get the pictures"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    picture = functools.partial(tfds.features.Image, shape=(None, None, 3))
    return tfds.core.DatasetInfo(
      builder=self,
      description="NLVR2: sentences about two photographs, true or false.",
      homepage="https://lil.nlp.cornell.edu/nlvr/",
      features=tfds.features.FeaturesDict(
        {
          "image_left": picture(),
          "image_right": picture(),
          "sentence": tfds.features.Text(),
          "label": tfds.features.ClassLabel(names=["false", "true"]),
          "identifier": tfds.features.Text(),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    parts = dict(_SPLITS)
    if (folder / _HIDDEN["test2"][1]).is_dir():
      parts |= _HIDDEN
    wanted = []
    for listing, images in parts.values():
      name = f"{listing}.json"
      wanted += [(name, f"nlvr2/data/{name}", _SOURCE), (images, _SOURCE)]
    found = manual.require(folder, wanted)
    return {
      split: manual.Split(
        manual.lines(listing),
        functools.partial(_example, manual.Pictures(images)),
      )
      for split, listing, images in zip(
        parts, found[::2], found[1::2], strict=True
      )
    }


def _example(
  pictures: manual.Pictures, name: str, line: bytes, tally: Tally
) -> dict[str, Any]:
  del name, tally
  row: Mapping[str, Any] = json.loads(line)
  stem = row["identifier"].rpartition("-")[0]
  if row["identifier"].startswith("train-"):
    stem = f"{row['directory']}/{stem}"
  label = str(row["label"]).lower()
  if label not in ("false", "true"):
    raise intake.Rejected("no label")
  return {
    "image_left": pictures.read(f"{stem}-img0.png"),
    "image_right": pictures.read(f"{stem}-img1.png"),
    "sentence": intake.caption(row["sentence"]),
    "label": label,
    "identifier": row["identifier"],
  }


BUILDERS = {"nlvr2": Nlvr2}
