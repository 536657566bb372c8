"""The command, and what all builders from files have in common."""

import importlib.util
import subprocess
import sys

import pytest

from tests.data.builders import toy
from vlp_jax.data import build, builders
from vlp_jax.data.builders import manual, streamed
from vlp_jax.errors import UserError


def _flickr(tmp_path, listing):
  folder = tmp_path / "manual"
  toy.put(folder / "dataset_flickr30k.json", listing)
  toy.put(folder / "flickr30k-images/1.jpg", toy.picture())
  return folder


def _image(name="1.jpg"):
  sentences = [{"raw": "a dog"}]
  return dict(filename=name, imgid=1, split="train", sentences=sentences)


def test_every_builder_says_what_it_wants():
  known = builders.constructors()
  assert {"coco_captions", "cc3m", "vqa_v2", "snli_ve"} <= set(known)
  for name, constructor in known.items():
    builder = constructor(data_dir="/nowhere", file_format="array_record")
    assert builder.name == name.partition("/")[0]
    assert "https://" in builder.MANUAL_DOWNLOAD_INSTRUCTIONS


def test_the_command_for_a_name():
  command = builders.command("coco_captions:1.0.0")
  assert command == (
    "python -m vlp_jax.data.build --name=coco_captions --manual_dir=DIR"
  )
  assert builders.command("nothing") == ""
  assert builders.command("cifar10")


def test_an_unknown_name_is_refused():
  with pytest.raises(UserError, match=r"vqa_v2.*did you mean coco_captions\?"):
    build.main(["--name=coco_caption"])


def test_a_missing_folder_is_told(tmp_path):
  with pytest.raises(UserError, match=r"--manual_dir=DIR is missing.*flickr"):
    build.build("flickr30k", data_dir=str(tmp_path))
  with pytest.raises(UserError, match="none does not exist or is empty"):
    build.build("flickr30k", str(tmp_path / "none"), str(tmp_path / "data"))


def test_a_split_of_nothing_is_an_error(tmp_path):
  _flickr(tmp_path, {"images": [_image("2.jpg"), _image("3.jpg")]})
  with pytest.raises(UserError, match="skipped 2: missing file"):
    toy.make("flickr30k", tmp_path)


@pytest.mark.parametrize(
  ("listing", "message"),
  [
    (b'{"images": [', "dataset_flickr30k.json: not valid JSON"),
    ([], "no list 'images'"),
    ({"rows": []}, "no list 'images'"),
    ({"images": ["1.jpg"]}, "not objects"),
  ],
)
def test_a_broken_list_is_an_error(listing, message, tmp_path):
  _flickr(tmp_path, listing)
  with pytest.raises(UserError, match=message):
    toy.make("flickr30k", tmp_path)
  left = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
  assert not left


def test_a_broken_zip_is_an_error(tmp_path):
  (tmp_path / "train2014.zip").write_bytes(b"PK")
  with pytest.raises(UserError, match="not a complete zip"):
    manual.Pictures(tmp_path / "train2014.zip")


def test_many_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(streamed, "_SHARD_BYTES", 2 * len(toy.picture()))
  rest = [_image() | {"split": split} for split in ("val", "test")]
  numbered = [_image() | {"imgid": i} for i in range(7)]
  _flickr(tmp_path, {"images": numbered + rest})
  builder = toy.make("flickr30k", tmp_path)
  assert builder.info.splits["train"].shard_lengths == [2, 2, 2, 1]
  assert [r["image_id"] for r in toy.read(builder)] == list(range(7))
  files = [path.name for path in builder.data_path.iterdir()]
  assert "flickr30k-train.array_record-00003-of-00004" in files
  assert not [name for name in files if name.endswith(".partial")]


def test_building_twice_changes_nothing(tmp_path, capsys):
  images = [_image() | {"split": s} for s in ("train", "val", "test")]
  _flickr(tmp_path, {"images": images})
  argv = ["--name=flickr30k", f"--manual_dir={tmp_path}/manual"]
  argv.append(f"--data_dir={tmp_path}/data")
  build.main(argv)
  first = capsys.readouterr()
  assert first.out.startswith(f"{tmp_path}/data/flickr30k/1.0.0 (")
  build.main(argv)
  assert "is there already" in capsys.readouterr().out


@pytest.mark.skipif(
  importlib.util.find_spec("tensorflow") is not None,
  reason="TensorFlow is there",
)
@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_tfds_own_builders_need_tensorflow(name, tmp_path):
  with pytest.raises(UserError, match=f"building {name} .*needs .*tensorflow"):
    build.build(name, str(tmp_path), str(tmp_path / "data"))


def test_the_command_exits_with_one_line(tmp_path):
  (tmp_path / "x").touch()
  command = [sys.executable, "-m", "vlp_jax.data.build", "--name=vqa_v2"]
  folders = [f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}/data"]
  done = subprocess.run([*command, *folders], capture_output=True, text=True)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: missing")
