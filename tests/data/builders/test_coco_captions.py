import zipfile

import pytest

from tests.data.builders import toy
from vlp_jax.config import default_config
from vlp_jax.data import sources

IMAGES = [  # filepath, cocoid, split
  ("train2014", 9, "train"),
  ("val2014", 42, "restval"),
  ("val2014", 391895, "test"),
  ("val2014", 60623, "val"),
  ("val2014", 113588, "train"),  # missing
  ("train2014", 25, "train"),  # damaged
]


def _entry(number, folder, cocoid, split):
  sentences = [
    {"tokens": ["a"], "raw": text, "imgid": number, "sentid": 5 * number + i}
    for i, text in enumerate(["A man.", " two\nlines ", "A man."])
  ]
  if cocoid == 9:
    sentences.append({"tokens": [], "raw": " ", "imgid": 0, "sentid": 9})
  return {
    "filepath": folder,
    "filename": _name(folder, cocoid),
    "sentids": [s["sentid"] for s in sentences],
    "imgid": number,
    "sentences": sentences,
    "split": split,
    "cocoid": cocoid,
  }


def _name(folder, cocoid):
  return f"COCO_{folder}_{cocoid:012d}.jpg"


@pytest.fixture
def manual(tmp_path):
  folder = tmp_path / "manual"
  images = [_entry(i, *image) for i, image in enumerate(IMAGES)]
  toy.put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
  for part, cocoid, _ in IMAGES[:4]:
    toy.put(folder / part / _name(part, cocoid), toy.picture(cocoid))
  damaged = toy.picture(1)[:-80]
  toy.put(folder / "train2014" / _name("train2014", 25), damaged)
  return folder


def test_karpathys_split(manual, tmp_path, capsys):
  builder = toy.make("coco_captions", tmp_path)
  assert toy.sizes(builder) == {"train": 2, "validation": 1, "test": 1}
  train = {record["image_id"]: record for record in toy.read(builder)}
  assert set(train) == {9, 42}
  assert train[9]["image"] == toy.picture(9)
  # Repeated captions stay: retrieval counts them.
  assert train[9]["captions"] == ["A man.", "two lines", "A man."]
  assert toy.skipped(builder) == {
    "missing file": ["COCO_val2014_000000113588.jpg"],
    "damaged picture": ["COCO_train2014_000000000025.jpg"],
  }
  out, err = capsys.readouterr()
  assert "coco_captions: split train: 2 records; skipped 1: damaged" in err
  assert "noted 1: empty caption (COCO_train2014_000000000009.jpg)" in err
  assert "train: 2" in out and "validation: 1" in out


def test_restval_can_be_left_out(manual, tmp_path):
  builder = toy.make("coco_captions/no_restval", tmp_path)
  assert [record["image_id"] for record in toy.read(builder)] == [9]


def test_the_zips_will_do(manual, tmp_path):
  for part in ("train2014", "val2014"):
    with zipfile.ZipFile(manual / f"{part}.zip", "w") as archive:
      for path in (manual / part).iterdir():
        archive.write(path, f"{part}/{path.name}")
        path.unlink()
    (manual / part).rmdir()
  builder = toy.make("coco_captions", tmp_path)
  assert toy.sizes(builder) == {"train": 2, "validation": 1, "test": 1}
  assert "missing file" in toy.skipped(builder)


def test_the_pipeline_reads_it(manual, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  toy.make("coco_captions", tmp_path)
  config = default_config()
  config.data.name = "coco_captions"
  source = sources.open_source(config.data, "test")
  (record,) = source
  assert record["image_id"] == 391895 and len(record["captions"]) == 3


def test_missing_files_are_named(tmp_path):
  message = toy.missing("coco_captions", tmp_path)
  for name in ("dataset_coco.json", "train2014 (or train2014.zip)", "val2014"):
    assert f"missing {tmp_path / 'manual' / name}" in message
