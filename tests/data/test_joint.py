"""Joint training: streams of pictures and of clips, in turn."""

import itertools
import json

import numpy as np
import pytest

from tests.data.test_clips import animation
from vlp_jax.data import joint, pipeline, turns
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError


@pytest.fixture
def both(jsonl_config, tmp_path):
  """20 pictures, and 6 clips for two of five steps."""
  folder = tmp_path / "clips"
  folder.mkdir()
  rows = []
  for i in range(6):
    (folder / f"{i}.gif").write_bytes(animation(count=4 * i + 4))
    rows.append({"image": f"{i}.gif", "caption": f"a film {i}"})
  rows = [json.dumps(row | {"split": "train"}) for row in rows]
  (folder / "clips.jsonl").write_text("\n".join(rows))
  config = jsonl_config
  config.total_steps = 100
  config.tokenizer.vocab_size = 100
  config.data.augment = "crop"
  config.clips.update(
    share=0.4,
    source=str(folder / "clips.jsonl"),
    num_frames=3,
    image_size=8,
    batch_size=4,
  )
  return config


def opened(config):
  streams = joint.open_streams(joint.configs(config))
  union = joint.union(streams)
  return streams, tokenizer_lib.get_tokenizer(config, union)


def take(config, count, start=0, host=0, num_hosts=1, bad=None):
  streams, tokenizer = opened(config)
  batches = joint.JointBatches(
    streams,
    tokenizer,
    start_step=start,
    bad_records=bad or {},
    host=host,
    num_hosts=num_hosts,
  )
  found = list(itertools.islice(batches, count))
  batches.close()
  return found, batches


def assert_equal(actual, expected):
  for (a, x), (b, y) in zip(actual, expected, strict=True):
    assert a == b and x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def test_whose_turn_it_is():
  found = turns.Turns([0.6, 0.4])
  assert found.parts == [3, 2]
  had = [0, 0]
  for n in range(23):
    assert found.before(n) == had
    who, number = found(n)
    assert number == had[who]
    had[who] += 1
    assert abs(had[1] - 0.4 * (n + 1)) < 1


def test_streams_have_their_shares_and_shapes(both):
  found, _ = take(both, 10)
  assert [number for number, _ in found].count(1) == 4
  for number, batch in found:
    shape = (4, 3, 8, 8, 3) if number else (8, 16, 16, 3)
    assert batch["image"].shape == shape
    assert len(batch["text"]) == shape[0]


def test_each_stream_is_what_it_would_be_alone(both):
  found, _ = take(both, 10)
  streams, tokenizer = opened(both)
  for number, stream in enumerate(streams):
    own = [batch for who, batch in found if who == number]
    alone = pipeline.train_batches(stream.source, tokenizer, stream.config)
    with alone:
      expected = list(itertools.islice(alone, len(own)))
    assert_equal([(0, x) for x in own], [(0, x) for x in expected])


def test_a_run_goes_on_at_any_step(both):
  found, _ = take(both, 9)
  for start in range(1, 9):
    assert_equal(take(both, 9 - start, start)[0], found[start:])


def test_hosts_share_each_batch(both):
  found, _ = take(both, 5)
  hosts = [take(both, 5, host=host, num_hosts=2)[0] for host in (0, 1)]
  for (_, batch), (_, first), (_, second) in zip(found, *hosts, strict=True):
    for key in batch:
      rows = np.concatenate([first[key], second[key]])
      np.testing.assert_array_equal(rows, batch[key])


def test_bad_records_are_counted_by_stream(both, tmp_path):
  (tmp_path / "clips" / "2.gif").write_bytes(animation(count=4)[:60])
  both.data.max_bad = both.clips.share = 0.5
  _, batches = take(both, 6, bad={"train": 5})
  assert batches.bad_records["train"] == 5
  # Twelve of the clips were read: each twice.
  assert batches.bad_records["train_clips"] == 2


def test_one_tokenizer_reads_both(both):
  streams, tokenizer = opened(both)
  union = joint.union(streams)
  assert len(union) == 26
  captions = list(union.captions())
  assert "a film 3" in captions and "number 3" in captions
  assert joint.examples_a_step(streams) == pytest.approx(0.6 * 8 + 0.4 * 4)
  names = joint.fingerprint(streams, tokenizer)
  both.clips.share = 0.25
  others = joint.fingerprint(joint.open_streams(joint.configs(both)), tokenizer)
  differ = {key for key in names if names[key] != others[key]}
  assert differ == {"train_clips_share"}


def test_without_clips_there_is_one_stream(both):
  both.clips.share = 0.0
  (stream,) = joint.open_streams(joint.configs(both))
  assert stream.config is both and stream.share == 1
  assert joint.union([stream]) is stream.source
  found, _ = take(both, 4)
  assert [number for number, _ in found] == [0] * 4


@pytest.mark.parametrize(
  "fields, says",
  [
    (dict(share=1.0), "leaves no step for pictures"),
    (dict(source=""), "needs data"),
    (dict(num_frames=0), "must be at least 1"),
  ],
)
def test_impossible_clips(both, fields, says):
  both.clips.update(fields)
  with pytest.raises(UserError, match=f"^config.clips.*{says}"):
    joint.configs(both)


def test_clips_need_pictures_beside_them_and_a_length(both):
  both.data.num_frames = 4
  with pytest.raises(UserError, match=r"config.data.num_frames=0"):
    joint.configs(both)
  both.data.num_frames = both.total_steps = 0
  with pytest.raises(UserError, match=r"config.total_steps"):
    joint.configs(both)
