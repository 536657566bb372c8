import json
import os
import pickle

import pytest

from tests.data.builders import toy
from vlp_jax.config import default_config
from vlp_jax.data import sources
from vlp_jax.data.builders import refcoco
from vlp_jax.errors import UserError


def _ref(number, image_id, split, texts, ann_id=None, category_id=18):
  return {
    "sent_ids": [10 * number + i for i in range(len(texts))],
    "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
    "ann_id": 100 + number if ann_id is None else ann_id,
    "ref_id": number,
    "image_id": image_id,
    "split": split,
    "sentences": [
      {
        "tokens": text.split(),
        "raw": text.capitalize(),
        "sent_id": 10 * number + i,
        "sent": text,
      }
      for i, text in enumerate(texts)
    ],
    "category_id": category_id,
  }


REFS = [
  _ref(0, 7, "train", ["left dog", "the dog on the left"]),
  _ref(1, 8, "val", ["brown dog"]),
  _ref(2, 7, "train", ["right dog", " "]),
  _ref(3, 9, "testA", ["man in red"], category_id=1),
  _ref(4, 10, "testB", ["dog"]),
  _ref(5, 11, "train", ["missing picture"]),
  _ref(6, 8, "val", ["no such object"], ann_id=999),
]


def _write(tmp_path, refs=REFS, folder="refcoco", author="unc", protocol=0):
  manual = tmp_path / "manual"
  instances = {
    "info": {},
    "licenses": [],
    "images": [
      {
        "id": image_id,
        "file_name": f"COCO_train2014_{image_id:012d}.jpg",
        "height": 16,
        "width": 24,
        "license": 1,
      }
      for image_id in (7, 8, 9, 10, 11)
    ],
    "annotations": [
      {
        "id": 100 + i,
        "image_id": 7,
        "bbox": [1.5, 2, 3 + i, 4.25],
        "category_id": 18,
        "segmentation": [[1, 2, 3, 4, 5, 6]],
        "area": 9.0,
        "iscrowd": 0,
      }
      for i in range(6)
    ],
    "categories": [
      {"supercategory": "animal", "id": 18, "name": "dog"},
      {"supercategory": "person", "id": 1, "name": "person"},
    ],
  }
  toy.put(manual / folder / "instances.json", instances)
  content = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol)
  toy.put(manual / folder / f"refs({author}).p", content)
  for image_id in (7, 8, 9, 10):
    path = manual / "train2014" / f"COCO_train2014_{image_id:012d}.jpg"
    toy.put(path, toy.picture(image_id))


def test_pictures_with_their_expressions(tmp_path, monkeypatch, capsys):
  _write(tmp_path)
  builder = toy.make("refcoco_unc", tmp_path)
  assert toy.sizes(builder) == {
    **{"train": 1, "validation": 1, "testA": 1, "testB": 1}
  }
  (record,) = toy.read(builder)
  assert record["image"] == toy.picture(7)
  assert record["image_id"] == 7
  assert record["captions"] == ["left dog", "the dog on the left", "right dog"]
  assert json.loads(record["refs"]) == [
    {
      "ref_id": 0,
      "sentences": ["left dog", "the dog on the left"],
      "box": [1.5, 2.0, 4.5, 6.25],
      "category": "dog",
    },
    {
      "ref_id": 2,
      "sentences": ["right dog"],
      "box": [1.5, 2.0, 6.5, 6.25],
      "category": "dog",
    },
  ]
  (person,) = toy.read(builder, "testA")
  assert json.loads(person["refs"])[0]["category"] == "person"
  assert toy.skipped(builder) == {"missing file": ["image 11"]}
  told = capsys.readouterr().err
  assert "noted 1: empty caption (image 7 ref 2)" in told
  assert "object is not in instances.json (image 8 ref 6)" in told

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  config = default_config().data
  config.name = "refcoco_unc"
  opened = sources.open_source(config, "train")[0]
  assert opened["captions"] == record["captions"] and opened["image_id"] == 7
  assert opened["refs"] == record["refs"]


@pytest.mark.parametrize(
  ("name", "folder", "author", "protocol"),
  [
    ("refcoco_google", "refcoco", "google", 2),
    ("refcocoplus_unc", "refcoco+", "unc", 0),
    ("refcocog_google", "refcocog", "google", 2),
    ("refcocog_umd", "refcocog", "umd", 4),
  ],
)
def test_the_other_sets(name, folder, author, protocol, tmp_path):
  refs = [_ref(0, 7, "train", ["dog"]), _ref(1, 8, "test", ["café dog"])]
  _write(tmp_path, refs, folder, author, protocol)
  builder = toy.make(name, tmp_path)
  assert builder.name == name
  assert toy.sizes(builder) == {"train": 1, "test": 1}
  assert toy.read(builder, "test")[0]["captions"] == ["café dog"]


def test_what_python_2_has_written(tmp_path):
  path = tmp_path / "refs(unc).p"
  head = (
    b"(lp0\n(dp1\nS'image_id'\np2\nI7\nsS'split'\np3\nS'train'\np4\nsS'ref_id'"
  )
  tail = b"\nI0\nsS'ann_id'\nI1\nsS'sentences'\n(lsS'file_name'\nS'\\xe9'\nsa."
  path.write_bytes(head + tail)
  (ref,) = refcoco.read_refs(path)
  assert ref["split"] == "train" and ref["file_name"] == "\ufffd"


class _Evil:
  def __reduce__(self):
    return os.system, ("echo pwned",)


@pytest.mark.parametrize(
  ("refs", "message"),
  [
    (pickle.dumps([_Evil()]), r"it asks for (posix|nt)\.system"),
    (pickle.dumps([{1}, UserError]), "it asks for vlp_jax.errors.UserError"),
    (b"<html>404</html>", "not a pickle of plain lists"),
    (pickle.dumps(REFS)[:100], "not a pickle of plain lists"),
    (pickle.dumps({"a": 1}), "not a list of references"),
    (pickle.dumps([{"image_id": 3}]), "not a list of references"),
  ],
)
def test_pickles_that_are_not_plain_lists(refs, message, tmp_path, capfd):
  _write(tmp_path, refs)
  with pytest.raises(UserError, match=message) as error:
    toy.make("refcoco_unc", tmp_path)
  assert "\n" not in str(error.value) and "refs(unc).p" in str(error.value)
  assert "pwned" not in capfd.readouterr().out


def test_missing_files_are_named(tmp_path):
  message = toy.missing("refcocoplus_unc", tmp_path)
  folder = f"{tmp_path}/manual"
  assert f"missing {folder}/refcoco+/refs(unc).p, from https" in message
  assert f"missing {folder}/refcoco+/instances.json, from https" in message
  assert f"missing {folder}/train2014 (or train2014.zip), from" in message
