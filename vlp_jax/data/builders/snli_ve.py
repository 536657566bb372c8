"""SNLI-VE (Xie et al., 2019): does a sentence follow from a Flickr30k picture?

529,527 sentences to train, 17,858 to validate (dev), 17,901 to test.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.builders.flickr30k import FLICKR
from vlp_jax.data.prepare.entries import Tally

_SOURCE = "https://github.com/necla-ml/SNLI-VE"
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_LABELS = ("contradiction", "neutral", "entailment")


class SnliVe(manual.ManualBuilder, skip_registration=True):
  """Builder of `snli_ve`: a record is a sentence with its picture."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"snli_ve_train.jsonl, snli_ve_dev.jsonl and snli_ve_test.jsonl from "
    f"{_SOURCE}, and the folder flickr30k-images of the archive from {FLICKR}"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="SNLI-VE: visual entailment on Flickr30k pictures.",
      homepage=_SOURCE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "sentence": tfds.features.Text(),  # the hypothesis
          "label": tfds.features.ClassLabel(names=_LABELS),
          "flickr_id": np.int64,
          "pair_id": tfds.features.Text(),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    names = [f"snli_ve_{part}.jsonl" for part in _SPLITS.values()]
    *lists, images = manual.require(
      folder,
      [*((name, _SOURCE) for name in names), ("flickr30k-images", FLICKR)],
    )
    make = functools.partial(_example, manual.Pictures(images))
    return {
      split: manual.Split(manual.lines(path), make)
      for split, path in zip(_SPLITS, lists, strict=True)
    }


def _example(
  pictures: manual.Pictures, name: str, line: bytes, tally: Tally
) -> dict[str, Any]:
  del name, tally
  row = json.loads(line)
  if row["gold_label"] not in _LABELS:  # "-": people did not agree
    raise intake.Rejected("no label")
  flickr_id = row["Flickr30K_ID"]
  return {
    "image": pictures.read(f"{flickr_id}.jpg"),
    "sentence": intake.caption(row["sentence2"]),
    "label": row["gold_label"],
    "flickr_id": int(flickr_id),
    "pair_id": row.get("pairID", ""),
  }


BUILDERS = {"snli_ve": SnliVe}
