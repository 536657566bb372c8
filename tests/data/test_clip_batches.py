"""Batches of clips: `data.num_frames`."""

import io
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.test_clips import animation
from tests.data.toy import assert_equal
from vlp_jax import config as config_lib
from vlp_jax import train_state
from vlp_jax.data import (
  clips,
  motion_language,
  pipeline,
  sources,
  train_tokenizer,
  transforms,
  warn,
)
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError


@pytest.fixture
def gifs(config, tmp_path):
  """Clips whose frame i is of the grey 6 i; clip c has 4 c + 4 frames."""
  for number in range(9):
    (tmp_path / f"{number}.gif").write_bytes(animation(count=4 * number + 4))
  return _listed(config, tmp_path, [f"{number}.gif" for number in range(9)])


def _listed(config, folder, names):
  rows = [
    {"image": name, "caption": f"clip {i}", "split": "train"}
    for i, name in enumerate(names)
  ]
  path = folder / "clips.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  config.data.source = str(path)
  config.data.num_frames = 4
  return config


def take(config, count, **kwargs):
  source = sources.open_source(config.data, "train")
  tokenizer = tokenizer_lib.get_tokenizer(config, source)
  with pipeline.train_batches(source, tokenizer, config, **kwargs) as batches:
    return list(itertools.islice(batches, count))


def places_of(batch):
  """Returns which frames are in a batch, `[B, F]`."""
  means = batch["image"].mean(axis=(2, 3, 4)) / 6
  np.testing.assert_allclose(means, means.round(), atol=0.01)
  return means.round().astype(int)


def test_a_frame_of_each_segment(gifs):
  seen = {}
  for batch in take(gifs, 40):
    assert batch["image"].shape == (8, 4, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    spec = train_state.batch_spec(gifs)["image"]
    assert (spec.shape, spec.dtype) == (batch["image"].shape, np.uint8)
    for image_id, row in zip(batch["image_id"], places_of(batch), strict=True):
      quarter = image_id + 1
      assert (row // quarter == [0, 1, 2, 3]).all()
      seen.setdefault(int(image_id), set()).update(row.tolist())
  assert seen[0] == {*range(4)} and seen[3] == {*range(16)}


def test_clips_are_a_function_of_the_batch_number(gifs):
  expected = take(gifs, 6)
  assert_equal(take(gifs, 3, start_step=3), expected[3:])
  hosts = [take(gifs, 6, host=host, num_hosts=2) for host in range(2)]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*hosts, strict=True)
  ]
  assert_equal(joined, expected)
  gifs.data.num_workers = 2
  assert_equal(take(gifs, 4), expected[:4])
  gifs.data.seed = 1
  assert (take(gifs, 1)[0]["image"] != expected[0]["image"]).any()


@pytest.mark.parametrize("augment", ["crop", "randaugment"])
def test_frames_share_crop_and_flip(config, tmp_path, augment):
  """Frames that are equal stay so, while clips differ."""
  rng = np.random.default_rng(0)
  still = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
  still.save(tmp_path / "still.png")
  config.data.update(augment=augment, crop_scale=(0.2, 1.0), flip=0.5)
  _listed(config, tmp_path, ["still.png"])
  (batch,) = take(config, 1)
  clip = batch["image"]
  np.testing.assert_array_equal(clip, np.repeat(clip[:, :1], 4, axis=1))
  assert len({row.tobytes() for row in clip}) == 8
  # A clip is cropped as the picture would be.
  config.data.num_frames = 0
  (pictures,) = take(config, 1)
  np.testing.assert_array_equal(pictures["image"], clip[:, 0])
  np.testing.assert_array_equal(pictures["text"], batch["text"])


def test_evaluation_takes_the_middle_frames(gifs):
  source = sources.open_source(gifs.data, "train")
  first, last = pipeline.eval_images(source, gifs, 5)
  assert first["image"].shape == last["image"].shape == (5, 4, 16, 16, 3)
  assert last["mask"].tolist() == [True] * 4 + [False]
  assert places_of(first)[2].tolist() == [1, 4, 7, 10]
  for number, row in enumerate(places_of(first).tolist()):
    assert row == clips.places(4 * number + 4, 4)
  stills = list(pipeline.pictures(source, gifs))
  assert sum(map(len, stills)) == 9 * 4 and stills[0].shape[1:] == (16, 16, 3)


def test_short_clips_repeat_frames(gifs):
  gifs.data.num_frames = 6
  source = sources.open_source(gifs.data, "train")
  batch = next(pipeline.eval_images(source, gifs, 9))
  assert places_of(batch)[0].tolist() == [0, 1, 1, 2, 3, 3]
  for batch in take(gifs, 4):
    rows = places_of(batch)[batch["image_id"] == 0]
    assert (rows == [0, 0, 1, 2, 2, 3]).all()


def test_bad_clips_are_named_and_replaced(gifs, tmp_path, capsys):
  whole = (tmp_path / "8.gif").read_bytes()
  (tmp_path / "8.gif").write_bytes(whole[: len(whole) // 2])
  batches = take(gifs, 6)
  assert all(8 not in batch["image_id"] for batch in batches)
  err = capsys.readouterr().err
  assert err.count("skipped") == 2 and "8.gif: " in err  # and the count
  warn._seen.clear()
  source = sources.open_source(gifs.data, "train")
  batch = next(pipeline.eval_images(source, gifs, 9))
  assert "8.gif" in capsys.readouterr().err
  assert batch["image"][7].any() and not batch["image"][8].any()
  assert batch["mask"].all()


def test_pictures_are_as_they_were(config, tmp_path):
  """Without frames, no number is drawn that was not drawn before."""
  rng = np.random.default_rng(0)
  for number in range(9):
    pixels = rng.integers(0, 256, (30, 20 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{number}.png")
  _listed(config, tmp_path, [f"{number}.png" for number in range(9)])
  config.data.update(num_frames=0, augment="crop", crop_scale=(0.2, 1.0))
  source = sources.open_source(config.data, "train")
  tokenizer = tokenizer_lib.get_tokenizer(config, source)
  assert "Clip" not in str(pipeline.data_fingerprint(source, tokenizer, config))
  (batch,) = take(config, 1, start_step=2)
  order = source.order(_seeds(config)[0])
  crop = transforms.RandomResizedCrop(16, (0.2, 1.0))
  for row in range(8):
    place = 2 * 8 + row
    state = np.random.Philox(_seeds(config)[1], counter=[0, 0, 0, place])
    data = source[order[place]]["image"]
    expected = crop(transforms.Decode()(data), np.random.Generator(state))
    np.testing.assert_array_equal(batch["image"][row], expected)


def _seeds(config):
  seeds = np.random.SeedSequence([config.seed, config.data.seed])
  return seeds.generate_state(2).tolist()


def test_scenes_video(config, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config.data.update(name="scenes_video/debug", num_frames=3, image_size=64)
  (batch,) = take(config, 1)
  assert batch["image"].shape == (8, 3, 64, 64, 3)
  source = sources.open_source(config.data, "test")
  record = source[5]
  assert source.pair(5)["image"] == record["image"]
  copy = pickle.loads(pickle.dumps(source))
  assert source.annotated and copy.language is motion_language
  frames = [
    np.asarray(Image.open(io.BytesIO(record["image"][place])))
    for place in clips.places(len(record["image"]), 3)
  ]
  shown = pipeline.eval_image(record["image"], config.data)
  np.testing.assert_array_equal(shown, frames)
  config.data.num_frames = 0
  message = r"no Image features .* for its clips, set --config.data.num_frames"
  with pytest.raises(UserError, match=message):
    sources.open_source(config.data, "train")


def test_a_tokenizer_of_the_captions_of_clips(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  flags = ["--name=scenes_video/debug", "--vocab_size=100"]
  train_tokenizer.main([*flags, f"--output={tmp_path}/clips.model"])
  assert "100 pieces from scenes_video/debug" in capsys.readouterr().out


def test_an_impossible_number_is_refused(config):
  config.total_steps = 1
  config.data.num_frames = -1
  with pytest.raises(UserError, match=r"config\.data\.num_frames is -1"):
    config_lib.validate(config)
  with pytest.raises(UserError, match=r"config\.data\.num_frames"):
    config_lib.override(config, ["data.num_frames=many"])


def test_the_fingerprint_tells(gifs):
  source = sources.open_source(gifs.data, "train")
  tokenizer = tokenizer_lib.get_tokenizer(gifs, source)
  before = pipeline.data_fingerprint(source, tokenizer, gifs)
  gifs.data.num_frames = 5
  assert pipeline.data_fingerprint(source, tokenizer, gifs) != before
