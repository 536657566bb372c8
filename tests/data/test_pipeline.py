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

from tests.data.toy import Toy, assert_equal, build, gray, png
from vlp_jax.data import pipeline, randaugment, sources, transforms
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError


def opened(config):
  source = sources.open_source(config.data, "train")
  return source, tokenizer_lib.get_tokenizer(config, source)


def take(config, count, **kwargs):
  with pipeline.train_batches(*opened(config), config, **kwargs) as batches:
    return list(itertools.islice(batches, count))


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


def test_a_host_may_have_blocks_apart(photos):
  """Of eight rows in four blocks, the second and the last."""
  rows = [2, 3, 6, 7]
  expected = [
    {key: value[rows] for key, value in batch.items()}
    for batch in take(photos, 3)
  ]
  assert_equal(take(photos, 3, host=(1, 3), num_hosts=4), expected)


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
      expected = pipeline.decode_image(
        source[int(image_id)]["image"], transforms.ResizeCenterCrop(16)
      )
      np.testing.assert_array_equal(image, expected)


def test_stretched(photos):
  photos.data.augment, photos.data.eval_resize = "none", "stretch"
  source, _ = opened(photos)
  stretch = transforms.Stretch(16)
  wanted = [
    pipeline.decode_image(source[i]["image"], stretch) for i in range(12)
  ]
  for batch in take(photos, 2):
    for image, image_id in zip(batch["image"], batch["image_id"], strict=True):
      np.testing.assert_array_equal(image, wanted[image_id])
  (batch,) = pipeline.eval_images(source, photos, 12)
  np.testing.assert_array_equal(batch["image"], wanted)


def rows(batches, field):
  return np.concatenate([batch[field] for batch in batches])


def test_flip(photos):
  plain = rows(take(photos, 10), "image")
  photos.data.flip = 1.0
  flipped = take(photos, 10)
  np.testing.assert_array_equal(rows(flipped, "image"), plain[:, :, ::-1])
  photos.data.flip = 0.5
  some = rows(take(photos, 10), "image")
  mirrored = (some == plain[:, :, ::-1]).all((1, 2, 3))
  assert (mirrored | (some == plain).all((1, 2, 3))).all()
  assert 20 < mirrored.sum() < 60


def test_randaugment_comes_after_crop_and_flip(photos, monkeypatch):
  photos.data.flip = 1.0
  flipped = rows(take(photos, 5), "image")
  photos.data.augment = "randaugment"
  augmented = rows(take(photos, 5), "image")
  changed = (augmented != flipped).any((1, 2, 3))
  assert 0.4 < changed.mean() < 0.9  # identity, and halves that are not done
  assert_equal(take(photos, 2, start_step=3), take(photos, 5)[3:])
  photos.data.num_workers = 2
  np.testing.assert_array_equal(rows(take(photos, 5), "image"), augmented)
  photos.data.num_workers = 0
  seen = []

  def watch(self, pixels, rng):
    seen.append(pixels)
    return pixels

  monkeypatch.setattr(pipeline, "_MAX_THREADS", 1)
  monkeypatch.setattr(randaugment.RandAugment, "__call__", watch)
  take(photos, 1)
  np.testing.assert_array_equal(seen[:8], flipped[:8])


def test_cleaned_captions(config, write_jsonl):
  captions = ["A dog, running!", "?!", "One - two/three"]
  config.data.source = str(
    write_jsonl([{"captions": captions, "split": "train"}])
  )

  def texts():
    return {tuple(row) for row in rows(take(config, 10), "text").tolist()}

  def ids(*captions):
    _, tokenizer = opened(config)
    return {tuple(tokenizer.encode(c, 12)[0].tolist()) for c in captions}

  assert texts() == ids(*captions)
  config.data.clean_captions = True
  assert texts() == ids("a dog running", "one two three")  # nothing is left
  config.data.max_words = 2
  assert texts() == ids("a dog", "one two")


@pytest.mark.parametrize(
  "field, value, says",
  [
    ("augment", "flip", "data.augment='flip' is unknown; it is none, crop, ra"),
    ("eval_resize", "fit", "data.eval_resize='fit' is unknown; it is crop or"),
    ("crop_scale", (0.0, 1.0), r"data.crop_scale=\(0.0, 1.0\) is no range"),
    ("crop_scale", (0.5, 0.4), "data.crop_scale="),
    ("crop_scale", (0.5, 1.1), "data.crop_scale="),
    ("crop_scale", (0.5,), r"data.crop_scale=\(0.5,\) .* \(LOW, HIGH\)"),
    ("flip", 1.5, r"data.flip=1.5 is not in \[0, 1\]"),
    ("flip", -0.5, "data.flip=-0.5 is not in"),
    ("max_bad", 2.0, "data.max_bad=2.0 is not in"),
    ("max_words", 3, "data.max_words=3 .* with data.clean_captions=true"),
    ("max_words", -1, "data.max_words=-1"),
  ],
)
def test_bad_settings(jsonl_config, field, value, says):
  jsonl_config.data[field] = value
  with pytest.raises(UserError, match=says) as error:
    take(jsonl_config, 1)
  assert "\n" not in str(error.value)


def test_batch_that_hosts_cannot_share(jsonl_config):
  with pytest.raises(
    UserError, match="batch_size=8 is not a multiple of the 3"
  ):
    take(jsonl_config, 1, num_hosts=3)


# --- What cannot be read ----------------------------------------------------


def test_unreadable_pictures_are_replaced_and_named(
  jsonl_config, tmp_path, capsys
):
  expected = take(jsonl_config, 10)
  for i in (4, 5, 19):
    (tmp_path / "images" / f"{i}.png").write_bytes(png("red")[:40])
  actual = take(jsonl_config, 10)
  messages = capsys.readouterr().err.splitlines()
  assert len(messages) == 3  # once each
  for i in (4, 5, 19):
    (message,) = [m for m in messages if f"images/{i}.png" in m]
    assert message.startswith("warning: skipped ")
    assert "picture cannot be decoded" in message
  assert any("(3 skipped in " in m for m in messages)
  # Their places have others, drawn anew at every visit; the rest is as before.
  before, after = np.array(ids_of(expected)), np.array(ids_of(actual))
  bad = np.isin(before, [4, 5, 19])
  np.testing.assert_array_equal(after[~bad], before[~bad])
  assert bad.sum() == 12 and len({*after[bad]}) > 6
  assert not {4, 5, 19} & {*after}
  for a, b in zip(actual, expected, strict=True):
    same = a["image_id"] == b["image_id"]
    for key in a:
      np.testing.assert_array_equal(a[key][same], b[key][same])
  assert_equal(take(jsonl_config, 10), actual)
  assert_equal(take(jsonl_config, 5, start_step=5), actual[5:])
  jsonl_config.data.num_workers = 2
  assert_equal(take(jsonl_config, 4), actual[:4])


@pytest.mark.parametrize(
  "workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_bad_records_are_counted(jsonl_config, tmp_path, workers):
  expected = [np.isin(b["image_id"], [4, 5]) for b in take(jsonl_config, 10)]
  for i in (4, 5):
    (tmp_path / "images" / f"{i}.png").write_bytes(b"")
  jsonl_config.data.num_workers = workers
  with pipeline.train_batches(*opened(jsonl_config), jsonl_config) as batches:
    assert batches.bad_records == 0
    for step in range(10):
      assert "bad" not in next(batches)
      assert batches.bad_records == np.sum(expected[: step + 1])
  with pipeline.train_batches(
    *opened(jsonl_config), jsonl_config, start_step=4, bad_records=7
  ) as batches:
    next(batches)
    assert batches.bad_records == 7 + np.sum(expected[4])
  counts = []
  for host in range(2):
    with pipeline.train_batches(
      *opened(jsonl_config), jsonl_config, host=host, num_hosts=2
    ) as batches:
      list(itertools.islice(batches, 10))
      counts.append(batches.bad_records)
  assert sum(counts) == np.sum(expected)


@pytest.mark.parametrize(
  "workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_too_many_bad_records(jsonl_config, tmp_path, workers):
  """One in twenty is: told when a thousand rows are known, not before."""
  (tmp_path / "images" / "7.png").write_bytes(b"")
  jsonl_config.data.num_workers = workers
  says = (
    r"pairs.jsonl:train: 50 of the 1000 records read so far .*mend the data, "
    r"or allow more than data.max_bad=0.01 of them"
  )
  with (
    pipeline.train_batches(*opened(jsonl_config), jsonl_config) as batches,
    pytest.raises(UserError, match=says) as error,
  ):
    for step in range(200):
      assert step < 125
      next(batches)
  assert "\n" not in str(error.value)
  # A share of the whole run, not of what was read since it went on.
  jsonl_config.data.max_bad = 0.05
  with pipeline.train_batches(
    *opened(jsonl_config), jsonl_config, start_step=1000, bad_records=390
  ) as batches:
    next(batches)
  with (
    pipeline.train_batches(
      *opened(jsonl_config), jsonl_config, start_step=1000, bad_records=402
    ) as batches,
    pytest.raises(UserError, match=r"40. of the 8008 records"),
  ):
    next(batches)


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
  geometry = transforms.ResizeCenterCrop(32)
  actual = pipeline.decode_image(file.getvalue(), geometry).astype(int)
  assert np.abs(actual - np.asarray(expected)).max() <= 1
  with pytest.raises(transforms.UnreadableImage):
    pipeline.decode_image(b"?", geometry)


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
    "data.flip": 0.5,
    "data.eval_resize": "stretch",
    "data.clean_captions": True,
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
  steps = fingerprint(
    **{
      "data.augment": "randaugment",
      "data.flip": 0.5,
      "data.clean_captions": True,
      "data.max_words": 30,
    }
  )["transforms"]
  assert [step.partition("(")[0] for step in steps] == [
    *("Decode", "RandomResizedCrop", "RandomFlip", "RandAugment"),
    *("CleanCaption", "PickCaption", "Tokenize"),
  ]


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
    timeout=600,
  )
  assert run.returncode == (3 if end == "fail" else 0)
  assert run.stdout == ""
  words = ("Traceback", "Exception", "Error", "leaked", "warning:")
  said = run.stderr.splitlines()
  assert not [line for line in said if any(word in line for word in words)]


def test_closed_batches_end(jsonl_config):
  batches = pipeline.train_batches(*opened(jsonl_config), jsonl_config)
  next(batches)
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)
