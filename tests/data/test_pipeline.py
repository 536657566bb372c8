import copy
import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.toy import Toy, build, gray, png
from vlp_jax.data import pipeline, sources, transforms, warn
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch):
  monkeypatch.setattr(warn, "_seen", type(warn._seen)(set))


def opened(config):
  source = sources.open_source(config.data, "train")
  return source, tokenizer_lib.get_tokenizer(config, source)


def take(config, count, **kwargs):
  with pipeline.train_batches(*opened(config), config, **kwargs) as batches:
    return list(itertools.islice(batches, count))


def assert_equal(actual, expected):
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def ids_of(batches):
  return np.concatenate([batch["image_id"] for batch in batches]).tolist()


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize("data", ["jsonl_config", "toy_config"])
def test_batches(request, data):
  config = request.getfixturevalue(data)
  source, tokenizer = opened(config)
  for batch in take(config, 5):
    shapes = {key: value.shape for key, value in batch.items()}
    assert shapes == {
      "image": (8, 16, 16, 3),
      "text": (8, 12),
      "text_len": (8,),
      "image_id": (8,),
    }
    assert batch["image"].dtype == np.uint8
    for key in ("text", "text_len", "image_id"):
      assert batch[key].dtype == np.int32
    for row, image_id in enumerate(batch["image_id"].tolist()):
      assert (batch["image"][row] == gray(image_id)).all()
      captions = [tokenizer.encode(c, 12) for c in source[image_id]["captions"]]
      (match,) = [c for c in captions if (c[0] == batch["text"][row]).all()]
      assert match[1] == batch["text_len"][row]


@pytest.fixture
def toy_config(config, toy_tfds):
  config.data.name = "toy"
  return config


@pytest.fixture
def photos(config, tmp_path):
  """Pictures of many sizes, cropped at random."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(12):
    size = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    captions = [f"caption {j} of {i}" for j in range(3)]
    rows.append({"image": f"{i}.png", "captions": captions, "split": "train"})
  path = tmp_path / "photos.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  config.data.source = str(path)
  config.data.augment = "crop"
  config.data.crop_scale = (0.3, 1.0)
  return config


def test_two_workers_make_the_batches_of_none(photos):
  expected = take(photos, 7)
  photos.data.num_workers = 2
  assert_equal(take(photos, 7), expected)
  assert_equal(take(photos, 3, start_step=4), expected[4:])


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_makes_the_same_batches(
  photos, monkeypatch, threads
):
  expected = take(photos, 10)
  monkeypatch.setattr(pipeline, "_MAX_THREADS", threads)
  assert_equal(take(photos, 10), expected)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_the_global_batch(photos, num_hosts):
  expected = take(photos, 5)
  hosts = [
    take(photos, 5, host=host, num_hosts=num_hosts) for host in range(num_hosts)
  ]
  joined = [
    {key: np.concatenate([rows[key] for rows in step]) for key in step[0]}
    for step in zip(*hosts, strict=True)
  ]
  assert_equal(joined, expected)


@pytest.mark.parametrize("start", [1, 3, 50])
def test_starting_at_a_step_equals_going_there(photos, start):
  expected = take(photos, start + 4)[start:]
  assert_equal(take(photos, 4, start_step=start), expected)


def test_every_record_once_an_epoch_in_a_new_order(jsonl_config):
  jsonl_config.batch_size = 8  # 2.5 batches an epoch of 20
  visited = ids_of(take(jsonl_config, 15))
  epochs = [visited[i : i + 20] for i in range(0, 120, 20)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_captions_and_crops_are_drawn_anew(photos):
  seen_texts, seen_images = {}, {}
  for batch in take(photos, 30):
    for i, image_id in enumerate(batch["image_id"].tolist()):
      seen_texts.setdefault(image_id, set()).add(batch["text"][i].tobytes())
      seen_images.setdefault(image_id, []).append(batch["image"][i].tobytes())
  assert all(len(texts) == 3 for texts in seen_texts.values())
  assert all(len({*v}) > len(v) / 2 for v in seen_images.values())


def test_seeds(photos):
  first = take(photos, 3)
  assert_equal(take(photos, 3), first)
  for field in ("seed", "data.seed"):
    other = copy.deepcopy(photos)
    other.update_from_flattened_dict({field: 1})
    assert ids_of(take(other, 3)) != ids_of(first)


def test_order_does_not_depend_on_the_batch_size(jsonl_config):
  first = ids_of(take(jsonl_config, 6))
  jsonl_config.batch_size = 16
  assert ids_of(take(jsonl_config, 3)) == first


@pytest.mark.parametrize("records", [1, 2, 3])
def test_batch_larger_than_the_data(config, write_jsonl, records):
  rows = [{"caption": f"c {i}", "split": "train"} for i in range(records)]
  config.data.source = str(write_jsonl(rows))
  config.batch_size = 6
  visited = ids_of(take(config, 4))
  for start in range(0, 24, records):
    assert sorted(visited[start : start + records]) == list(range(records))


def test_augmentation_none_is_the_evaluation_geometry(photos):
  photos.data.augment = "none"
  source, _ = opened(photos)
  for batch in take(photos, 2):
    for image, image_id in zip(batch["image"], batch["image_id"], strict=True):
      expected = pipeline.decode_image(source[int(image_id)]["image"], 16)
      np.testing.assert_array_equal(image, expected)


def test_bad_settings(jsonl_config):
  with pytest.raises(
    UserError, match="batch_size=8 is not a multiple of the 3"
  ):
    take(jsonl_config, 1, num_hosts=3)
  jsonl_config.data.augment = "flip"
  with pytest.raises(
    UserError, match=r"data.augment='flip' is unknown; it is no"
  ):
    take(jsonl_config, 1)


# --- What cannot be read ----------------------------------------------------


def test_unreadable_pictures_are_replaced_and_named(
  jsonl_config, tmp_path, capsys
):
  expected = take(jsonl_config, 10)
  for i in (4, 5, 19):
    (tmp_path / "images" / f"{i}.png").write_bytes(png("red")[:40])
  capsys.readouterr()
  actual = take(jsonl_config, 10)
  messages = capsys.readouterr().err.splitlines()
  assert len(messages) == 3  # once each
  for i in (4, 5, 19):
    (message,) = [m for m in messages if f"images/{i}.png" in m]
    assert message.startswith("warning: skipped ")
    assert "picture cannot be decoded" in message
  assert any("(3 skipped in " in m for m in messages)
  # Their places have the next readable picture; all others are as before.
  replaced = {4: 6, 5: 6, 19: 0}
  wanted = [replaced.get(i, i) for i in ids_of(expected)]
  assert ids_of(actual) == wanted
  for a, b in zip(actual, expected, strict=True):
    same = a["image_id"] == b["image_id"]
    np.testing.assert_array_equal(a["text"][same], b["text"][same])
  assert_equal(take(jsonl_config, 10), actual)
  assert_equal(take(jsonl_config, 5, start_step=5), actual[5:])
  jsonl_config.data.num_workers = 2
  assert_equal(take(jsonl_config, 4), actual[:4])


def test_picture_that_vanishes(jsonl_config, tmp_path, capsys):
  source, tokenizer = opened(jsonl_config)
  (tmp_path / "images" / "7.png").unlink()
  with pipeline.train_batches(source, tokenizer, jsonl_config) as batches:
    visited = ids_of(itertools.islice(batches, 5))
  assert 7 not in visited and sorted({*visited}) == [*range(7), *range(8, 20)]
  assert "images/7.png" in capsys.readouterr().err


class Blank(Toy):
  """Every other record has no caption."""

  name = "blank"
  counts = {"train": 8}  # noqa: RUF012

  def extra(self, index):
    captions = [{"text": " ", "id": 0}] if index % 2 else []
    return {} if index % 4 == 0 else {"captions": captions}


def test_records_without_captions_are_replaced(
  config, tmp_path, monkeypatch, capsys
):
  build(Blank, tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config.data.name = "blank"
  capsys.readouterr()
  assert {*ids_of(take(config, 4))} == {0, 4}
  messages = capsys.readouterr().err
  assert messages.count("blank/1.0.0:train[") == 6
  assert "skipped blank/1.0.0:train[3]: no caption" in messages


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable(config, write_jsonl, tmp_path, workers):
  rows = [{"caption": "c", "split": "train"} for _ in range(3)]
  config.data.source = str(write_jsonl(rows))
  config.data.num_workers = workers
  for path in (tmp_path / "images").iterdir():
    path.write_bytes(b"")
  with pytest.raises(UserError, match="3 records in a row have no readable"):
    take(config, 1)


# --- Evaluation -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 6, 20, 64])
def test_eval_images(jsonl_config, batch_size):
  source, _ = opened(jsonl_config)
  batches = list(pipeline.eval_images(source, jsonl_config, batch_size))
  assert len(batches) == -(-20 // batch_size)
  for batch in batches:
    assert batch["image"].shape == (batch_size, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["image_id"].shape == batch["mask"].shape == (batch_size,)
    assert batch["image_id"].dtype == np.int32
    assert batch["mask"].dtype == np.bool_
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  np.testing.assert_array_equal(
    joined["mask"], np.arange(len(joined["mask"])) < 20
  )
  np.testing.assert_array_equal(joined["image_id"][:20], np.arange(20))
  for i in range(20):
    assert (joined["image"][i] == gray(i)).all()
  assert not joined["image"][20:].any()


def test_eval_images_reads_a_view_of_a_source(jsonl_config):
  """Anything with `__len__` and `__getitem__` will do."""
  source, _ = opened(jsonl_config)
  view = [source[i] for i in (5, 3, 9)]
  (batch,) = pipeline.eval_images(view, jsonl_config, 4)
  assert batch["image_id"].tolist() == [5, 3, 9, 0]
  assert batch["mask"].tolist() == [True, True, True, False]


def test_eval_images_with_an_unreadable_one(jsonl_config, tmp_path, capsys):
  (tmp_path / "images" / "2.png").write_bytes(b"?")
  source, _ = opened(jsonl_config)
  (batch,) = pipeline.eval_images(source, jsonl_config, 20)
  assert batch["mask"].all() and not batch["image"][2].any()
  np.testing.assert_array_equal(batch["image_id"], np.arange(20))
  assert "images/2.png: picture cannot be decoded" in capsys.readouterr().err


def test_decode_image_against_pillow():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (9, 15, 3), dtype=np.uint8)
  image = Image.fromarray(pixels).resize((90, 60), Image.BICUBIC)
  file = io.BytesIO()
  image.save(file, "PNG")
  expected = image.resize((48, 32), Image.BICUBIC).crop((8, 0, 40, 32))
  actual = pipeline.decode_image(file.getvalue(), 32).astype(int)
  assert np.abs(actual - np.asarray(expected)).max() <= 1
  with pytest.raises(transforms.UnreadableImage):
    pipeline.decode_image(b"?", 32)


# --- Fingerprint ------------------------------------------------------------


def test_fingerprint(jsonl_config):
  def fingerprint(**changes):
    config = copy.deepcopy(jsonl_config)
    config.update_from_flattened_dict(changes)
    result = pipeline.data_fingerprint(*opened(config), config)
    assert json.loads(json.dumps(result)) == result
    return result

  first = fingerprint()
  assert fingerprint() == first
  assert first["records"] == 20 and first["batch_size"] == 8
  assert fingerprint(**{"data.num_workers": 2, "total_steps": 9}) == first
  for field, value in {
    "seed": 1,
    "data.seed": 1,
    "batch_size": 4,
    "data.augment": "crop",
    "data.image_size": 32,
    "tokenizer.max_len": 9,
  }.items():
    other = fingerprint(**{field: value})
    assert other != first, field
    assert other.keys() == first.keys()
  source, _ = opened(jsonl_config)
  tokenizer = tokenizer_lib.Tokenizer(tokenizer_lib.train(["others"], 64))
  assert pipeline.data_fingerprint(source, tokenizer, jsonl_config) != first
  cropped = fingerprint(**{"data.augment": "crop"})
  jsonl_config.data.crop_scale = (0.5, 1.0)
  assert fingerprint(**{"data.augment": "crop"}) != cropped


# --- Closing ----------------------------------------------------------------


_PROGRAM = """
import sys
from vlp_jax import config as config_lib
from vlp_jax.data import pipeline, sources, tokenizer

def main():
  config = config_lib.default_config()
  config.data.source, workers, end = sys.argv[1:]
  config.data.image_size, config.data.num_workers = 64, int(workers)
  source = sources.open_source(config.data, "train")
  batches = pipeline.train_batches(
    source, tokenizer.get_tokenizer(config, source), config)
  for _ in range(3):
    next(batches)
  if end == "close":
    batches.close()
    batches.close()
  if end == "fail":
    raise SystemExit(3)
  images = pipeline.eval_images(source, config, 4)
  next(images)

if __name__ == "__main__":
  main()
"""


@pytest.mark.parametrize(
  "workers, end", [("0", "leave"), ("0", "close"), ("2", "fail")]
)
def test_programs_end_without_a_word(jsonl_config, tmp_path, workers, end):
  program = tmp_path / "program.py"
  program.write_text(_PROGRAM)
  run = subprocess.run(
    [sys.executable, program, jsonl_config.data.source, workers, end],
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert run.returncode == (3 if end == "fail" else 0)
  assert run.stdout == "" and run.stderr == ""


def test_closed_batches_end(jsonl_config):
  batches = pipeline.train_batches(*opened(jsonl_config), jsonl_config)
  next(batches)
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)
