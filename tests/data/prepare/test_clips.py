"""`prepare` of clips: files, and folders of frames."""

import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.prepare import toy
from tests.data.test_clips import animation, gray_frames, video
from vlp_jax import config as config_lib
from vlp_jax.data import clips, pipeline, sources, tfds_fields
from vlp_jax.errors import UserError


def _put(root, name, text="a clip"):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.with_suffix(".txt").write_text(text)
  return path


def _frames(folder, count=10):
  folder.mkdir()
  for i, image in enumerate(gray_frames(count)):
    image.save(folder / f"{i:03d}.png")
  (folder / "notes.md").write_text("no frame")


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "clips"
  _put(root, "a.gif").write_bytes(animation(count=10))
  _put(root, "short.gif").write_bytes(animation(count=2))
  _put(root, "sub/cut.gif").write_bytes(animation()[:1000])
  _put(root, "empty.gif").write_bytes(b"")
  _put(root, "page.mp4").write_bytes(b"<html>gone</html>")
  _frames(_put(root, "frames"))
  _put(root, "none").mkdir()
  (root / "picture.png").write_bytes(b"left alone")
  return root


def _grays(folder):
  """Returns {id: which frames a record has}."""
  source = tfds.builder_from_directory(folder).as_data_source(
    "train", decoders={"frames": tfds_fields.SkipDecoding()}
  )
  found = {}
  for record in source:
    images = [Image.open(io.BytesIO(bytes(f))) for f in record["frames"]]
    assert {image.format for image in images} == {"JPEG"}
    name = record["image_id"].decode()
    found[name] = [round(np.asarray(i).mean() / 6) for i in images]
  return found


def test_files_and_folders_of_frames(root, tmp_path, monkeypatch):
  folder = toy.prepare(root, tmp_path, "--num_frames=4", "--max_bad=60%")
  assert _grays(folder) == {
    "a.gif": [1, 3, 6, 8],
    "frames": [1, 3, 6, 8],
    "short.gif": [0, 1],
  }
  assert toy.skipped(folder) == {
    "damaged video": ["sub/cut.gif"],
    "empty file": ["empty.gif"],
    "no frames": ["none"],
    "not a video": ["page.mp4"],
  }
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config = config_lib.default_config()
  config.data.update(name="toy", num_frames=2, image_size=16)
  source = sources.open_source(config.data, "train")
  batch = next(pipeline.eval_images(source, config, 3))
  rows = batch["image"].mean(axis=(2, 3, 4)).round() / 6
  assert sorted(rows.round().tolist()) == [[0, 1], [3, 8], [3, 8]]


def test_smaller_frames(root, tmp_path):
  flags = ("--num_frames=2", "--max_bad=60%", "--image_size=16")
  folder = toy.prepare(root, tmp_path, *flags)
  source = tfds.builder_from_directory(folder).as_data_source("train")
  shapes = {frame.shape for record in source for frame in record["frames"]}
  assert shapes == {(16, 24, 3)}


def test_lists_and_tars(tmp_path):
  root = tmp_path / "clips"
  root.mkdir()
  (root / "a.gif").write_bytes(animation(count=6))
  _frames(root / "b")
  rows = [{"video": name, "caption": name} for name in ("a.gif", "b")]
  (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
  with tarfile.open(tmp_path / "shard.tar", "w") as tar:
    for name, data in (("7.gif", animation(count=6)), ("7.txt", b"seven")):
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  flags = ("--num_frames=3",)
  listed = toy.prepare(root / "list.jsonl", tmp_path, *flags, name="listed")
  assert _grays(listed) == {"a.gif": [1, 3, 5], "b": [1, 5, 8]}
  packed = toy.prepare(tmp_path / "shard.tar", tmp_path, *flags, name="packed")
  assert _grays(packed) == {"7": [1, 3, 5]}


def test_videos(tmp_path):
  root = tmp_path / "clips"
  data = video(_put(root, "a.mp4"), "libx264", movflags="faststart")
  video(_put(root, "b.webm"), "libvpx")
  _put(root, "cut.mp4").write_bytes(data[: int(0.7 * len(data))])
  folder = toy.prepare(root, tmp_path, "--num_frames=4", "--max_bad=60%")
  places = clips.places(40, 4)
  assert _grays(folder) == {"a.mp4": places, "b.webm": places}
  assert toy.skipped(folder) == {"damaged video": ["cut.mp4"]}


def test_a_negative_number_is_refused(tmp_path):
  with pytest.raises(UserError, match="--num_frames=-1 is negative"):
    toy.prepare(tmp_path, tmp_path, "--num_frames=-1")
