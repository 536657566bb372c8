"""Small data sets: pictures with captions, as JSONL and as TFDS."""

import itertools
import json
import os

import pytest

from tests.data.toy import COLORS, Toy, build, gray, png
from vlp_jax import config as config_lib


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory):
  """A TFDS data directory that holds `toy`."""
  directory = tmp_path_factory.mktemp("tfds")
  build(Toy, directory)
  return directory


@pytest.fixture
def toy_tfds(toy_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(toy_dir))
  return toy_dir


@pytest.fixture
def write_jsonl(tmp_path):
  """Writes rows (dicts, or raw lines) as a list, and returns its path.

  Pictures are made for rows whose `image` is missing: `images/<row>.png`.
  Each writing is a second later than the one before, as if a user had done it:
  clocks of file systems are coarse, and an index is kept by time and size.
  """
  seconds = itertools.count(1_700_000_000)

  def write(rows, name="pairs.jsonl"):
    (tmp_path / "images").mkdir(exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
      if isinstance(row, dict) and not {"image", "file_name"} & {*row}:
        row = {"image": f"images/{i}.png", **row}
        (tmp_path / row["image"]).write_bytes(png(gray(i)))
      lines.append(row if isinstance(row, str) else json.dumps(row))
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    now = next(seconds)
    os.utime(path, (now, now))
    return path

  return write


@pytest.fixture
def config():
  """The common config, with a small batch and small pictures."""
  config = config_lib.default_config()
  config.batch_size = 8
  config.data.image_size = 16
  config.tokenizer.max_len = 12
  return config


@pytest.fixture
def jsonl_config(config, write_jsonl):
  """A config whose data are 20 pictures, number i of colour `gray(i)`."""
  rows = [
    {"captions": [f"a {COLORS[i % 5]} thing", f"number {i}"], "split": "train"}
    for i in range(20)
  ]
  config.data.source = str(write_jsonl(rows))
  return config
