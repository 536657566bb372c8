"""Sources of every kind with the same three pictures, and their records."""

import csv
import io
import json
import pathlib
import tarfile

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from tests.data.toy import png
from vlp_jax.data.prepare.__main__ import main

COLORS = {"a": "red", "b": "lime", "c": "blue"}
CAPTIONS = {"a": "a red field", "b": "ein grünes Feld", "c": "青い野原"}


def prepare(source, data_dir, *flags, name="toy", split="train:1"):
  """Runs the command in this process; returns the data set's folder."""
  flags = [f"--splits={split}", *flags] if split else flags
  main(
    [f"--source={source}", f"--name={name}", f"--data_dir={data_dir}", *flags]
  )
  return pathlib.Path(data_dir, name, "1.0.0")


def report(folder):
  return json.loads((folder / "prepare_report.json").read_text())


def skipped(folder):
  """Returns {reason: [names]} of the report."""
  found = report(folder)["skipped"]
  assert all(v["count"] == len(v["first"]) for v in found.values())
  return {reason: value["first"] for reason, value in found.items()}


def records(folder, split="train"):
  """Reads a data set with TFDS alone: {image_id: record}."""
  source = tfds.builder_from_directory(folder).as_data_source(split)
  found = {}
  for record in source:
    record["image_id"] = record["image_id"].decode()
    record["captions"] = [c.decode() for c in record["captions"]]
    assert record["image_id"] not in found
    found[record["image_id"]] = record
  return found


def folder_of_texts(root):
  root.mkdir()
  for key, color in COLORS.items():
    (root / f"{key}.png").write_bytes(png(color))
    (root / f"{key}.txt").write_text(CAPTIONS[key] + "\n", encoding="utf-8")
  return root


def _pictures(root):
  (root / "images").mkdir(parents=True)
  for key, color in COLORS.items():
    (root / "images" / f"{key}.png").write_bytes(png(color))


def _rows():
  return [
    {"file_name": f"images/{key}.png", "text": CAPTIONS[key]} for key in COLORS
  ]


def jsonl(root, name="pairs.jsonl"):
  _pictures(root)
  text = "\n".join(json.dumps(row, ensure_ascii=False) for row in _rows())
  (root / name).write_text(text + "\n", encoding="utf-8")
  return root / name


def metadata_jsonl(root):
  return jsonl(root, "metadata.jsonl").parent


def _csv(root, name, delimiter):
  _pictures(root)
  with (root / name).open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, ["file_name", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(_rows())
  return root / name


def comma_csv(root):
  return _csv(root, "pairs.csv", ",")


def tab_csv(root):
  return _csv(root, "pairs.csv", "\t")


def tsv(root):
  return _csv(root, "pairs.tsv", "\t")


def metadata_csv(root):
  return _csv(root, "metadata.csv", ",").parent


def parquet_paths(root):
  _pictures(root)
  table = pyarrow.Table.from_pylist(_rows())
  pyarrow.parquet.write_table(table, root / "pairs.parquet")
  return root / "pairs.parquet"


def parquet_bytes(root):
  """A folder of Parquet files, as Hugging Face stores pictures."""
  root.mkdir()
  for number, (key, color) in enumerate(COLORS.items()):
    image = {"bytes": png(color), "path": f"{key}.png"}
    table = pyarrow.Table.from_pylist(
      [{"image": image, "caption": CAPTIONS[key]}]
    )
    pyarrow.parquet.write_table(table, root / f"train-{number:05d}.parquet")
  return root


def add(tar, name, data, **fields):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for field, value in fields.items():
    setattr(info, field, value)
  tar.addfile(info, io.BytesIO(data))


def write_tar(path, keys, mode="w"):
  with tarfile.open(path, mode) as tar:
    for key in keys:
      add(tar, f"{key}.png", png(COLORS[key]))
      add(tar, f"{key}.txt", CAPTIONS[key].encode())
      row = {"key": key, "caption": CAPTIONS[key], "status": "success"}
      add(tar, f"{key}.json", json.dumps(row).encode())


def tars(root):
  root.mkdir()
  write_tar(root / "00000.tar", "ab")
  write_tar(root / "00001.tar", "c")
  return root


def tar_range(root):
  return f"{tars(root)}/{{00000..00001}}.tar"


def tar_glob(root):
  return f"{tars(root)}/*.tar"


def compressed_tar(root):
  root.mkdir()
  write_tar(root / "all.tar.gz", "abc", "w:gz")
  return root / "all.tar.gz"


KINDS = (
  *(folder_of_texts, jsonl, metadata_jsonl, comma_csv, tab_csv, tsv),
  *(metadata_csv, parquet_paths, parquet_bytes, tars, tar_range, tar_glob),
  *(compressed_tar,),
)
