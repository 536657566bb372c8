"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to one object.

Kazemzadeh et al. 2014, Yu et al. 2016 (unc), Mao et al. 2016 (google) and
Nagaraja et al. 2016 (umd). A record is a picture of COCO's train2014 with all
expressions of one split. `captions` are the expressions; `refs`, JSON, says
what each refers to: a list of `ref_id`, `sentences`, `box` ([x0, y0, x1, y1]
in pixels of the stored picture) and `category`.

In RefCOCOg's google split the same pictures are in train and validation.
"""

from __future__ import annotations

import functools
import json
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.errors import UserError

_SOURCE = "https://github.com/lichengunc/refer"
_COCO = "https://cocodataset.org/#download"
# data set: the owners' folder, and who split it
_SETS = {
  "refcoco_unc": ("refcoco", "unc"),
  "refcoco_google": ("refcoco", "google"),
  "refcocoplus_unc": ("refcoco+", "unc"),
  "refcocog_google": ("refcocog", "google"),
  "refcocog_umd": ("refcocog", "umd"),
}
_SPLITS = {"val": "validation"}  # others keep their names: testA, testB, ...


class _Objects(NamedTuple):
  """What instances.json has: names of files, boxes and categories by id."""

  files: dict[int, str]
  boxes: dict[int, Sequence[float]]
  categories: dict[int, str]


class RefCoco(manual.ManualBuilder, skip_registration=True):
  """Base of the builders of one split each."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "COCO's folder train2014 (or train2014.zip) from "
    f"{_COCO}, and the folders refcoco, refcoco+ or refcocog, each with "
    f"instances.json and refs(...).p, from {_SOURCE}"
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.name}: referring expressions on COCO's pictures.",
      homepage=_SOURCE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": np.int64,
          "refs": tfds.features.Text(
            doc="JSON: ref_id, sentences, box in pixels, category"
          ),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    name, author = _SETS[self.name]
    refs, instances, images = manual.require(
      folder,
      [
        (f"{name}/refs({author}).p", _SOURCE),
        (f"{name}/instances.json", _SOURCE),
        ("train2014", "train2014.zip", _COCO),
      ],
    )
    # Of a picture's refs in a split, which are not next to each other.
    grouped: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for ref in read_refs(refs):
      split = _SPLITS.get(ref["split"], ref["split"])
      pictures = grouped.setdefault(split, {})
      pictures.setdefault(ref["image_id"], []).append(ref)
    make = functools.partial(
      _example, manual.Pictures(images), _objects(instances)
    )
    return {
      split: manual.Split(
        [(f"image {image_id}", found) for image_id, found in pictures.items()],
        make,
      )
      for split, pictures in sorted(grouped.items())
    }


class _PlainUnpickler(pickle.Unpickler):
  """Reads lists, dicts, texts and numbers; no class, so no code either."""

  def find_class(self, module: str, name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_refs(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads `refs(...).p`, of which only plain containers are allowed.

  Returns:
    Dicts with `image_id` and `split`, and what else the file has.

  Raises:
    UserError: if it is damaged, asks for anything to be imported, or is not a
      list of references.
  """
  try:
    with path.open("rb") as file:  # Python 2 wrote it
      refs = _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
  except Exception as e:  # damaged pickles raise all sorts
    raise UserError(
      f"{path}: not a pickle of plain lists and dicts ({e}); get it again"
    ) from e
  wanted = {"image_id", "split", "ref_id", "ann_id", "sentences"}
  if not isinstance(refs, list) or not all(
    isinstance(ref, dict) and wanted <= ref.keys() for ref in refs
  ):
    raise UserError(f"{path}: not a list of references; is it the right file?")
  return refs


def _objects(path: pathlib.Path) -> _Objects:
  try:
    return _Objects(
      {r["id"]: r["file_name"] for r in manual.load(path, "images")},
      {r["id"]: r["bbox"] for r in manual.load(path, "annotations")},
      {r["id"]: r["name"] for r in manual.load(path, "categories")},
    )
  except KeyError as e:
    raise UserError(f"{path}: a row has no {e}; is it the right file?") from e


def _example(
  pictures: manual.Pictures,
  objects: _Objects,
  name: str,
  refs: Sequence[Mapping[str, Any]],
  tally: Tally,
) -> dict[str, Any]:
  kept = []
  for ref in refs:
    told = f"{name} ref {ref['ref_id']}"
    try:
      kept.append(_ref(objects, ref, told, tally))
    except intake.Rejected as e:
      tally.note(told, e.reason)
  if not kept:
    raise intake.Rejected("no usable reference")
  image_id = refs[0]["image_id"]
  if image_id not in objects.files:
    raise intake.Rejected("picture is not in instances.json")
  return {
    "image": pictures.read(objects.files[image_id]),
    "captions": [text for ref in kept for text in ref["sentences"]],
    "image_id": image_id,
    "refs": json.dumps(kept),
  }


def _ref(
  objects: _Objects, ref: Mapping[str, Any], told: str, tally: Tally
) -> dict[str, Any]:
  sentences = manual.captions(
    [dict(sentence).get("sent") for sentence in ref["sentences"]], told, tally
  )
  if ref["ann_id"] not in objects.boxes:
    raise intake.Rejected("object is not in instances.json")
  x, y, width, height = map(float, objects.boxes[ref["ann_id"]])
  if width <= 0 or height <= 0:
    raise intake.Rejected("empty box")
  return {
    "ref_id": ref["ref_id"],
    "sentences": sentences,
    "box": [round(edge, 2) for edge in (x, y, x + width, y + height)],
    "category": objects.categories.get(ref.get("category_id"), ""),
  }


BUILDERS = {
  name: type(
    "".join(part.capitalize() for part in name.split("_")),
    (RefCoco,),
    {"name": name, "__doc__": f"Builder of `{name}`."},
    skip_registration=True,
  )
  for name in _SETS
}
