import copy
import io
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.toy import Toy, assert_equal, build
from vlp_jax.data import mixture, pipeline, sources, turns
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError


@pytest.fixture
def write(tmp_path):
  """Writes a list of so many pictures, whose captions begin with its name."""

  def write(name, count, **extra):
    folder = tmp_path / name
    folder.mkdir()
    lines = []
    for i in range(count):
      rng = np.random.default_rng(i)
      pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / f"{i}.png")
      captions = [f"{name} {i} {letter}" for letter in "xyz"]
      row = {"image": f"{i}.png", "captions": captions, "split": "train"}
      lines.append(json.dumps(row | extra))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return str(path)

  return write


@pytest.fixture
def mixed(config, write):
  """7 parts of 5 pictures and 3 parts of 8."""
  config.data.mix = json.dumps({write("a", 5): 0.7, write("b", 8): 0.3})
  config.data.augment = "crop"
  config.data.crop_scale = (0.3, 1.0)
  config.tokenizer.vocab_size = 100
  return config


def opened(config):
  source = mixture.open_training(config.data)
  return source, tokenizer_lib.get_tokenizer(config, source)


def take(config, count, **kwargs):
  with pipeline.train_batches(*opened(config), config, **kwargs) as batches:
    return list(itertools.islice(batches, count))


def visited(config, count, field="image_id"):
  return np.concatenate([b[field] for b in take(config, count)]).tolist()


# --- The table --------------------------------------------------------------


def counts(parts, rounds):
  picks = np.tile(turns.table(parts), rounds)
  return (picks[:, None] == np.arange(len(parts))).cumsum(0)


@pytest.mark.parametrize(
  "parts",
  [
    *([1], [7, 3], [3, 7], [1, 1], [1, 999], [47, 953], [1, 1, 1], [5, 3, 2]),
    *([1, 2, 3, 4], [50, 1, 1, 1, 1], [300, 7, 50, 2, 1, 1, 3]),
  ],
)
def test_the_first_n_have_their_shares(parts):
  total = sum(parts)
  had = counts(parts, 3)
  due = np.arange(1, 3 * total + 1)[:, None] * np.array(parts)
  assert (had >= due // total).all() and (had <= -(-due // total)).all()
  assert len(turns.table(parts)) == total


@pytest.mark.parametrize(
  "parts, most", [([7, 3], 1), ([2, 97], 1), ([5, 3, 2], 2)]
)
def test_any_window_has_its_shares(parts, most):
  total = sum(parts)
  had = np.concatenate([np.zeros((1, len(parts))), counts(parts, 4)])
  for n in (1, 2, 3, 8, total - 1, total, total + 5):
    share = n * np.array(parts) / total
    assert np.abs(had[n:] - had[:-n] - share).max() < most


def test_weights_become_whole_numbers():
  assert turns.whole([0.7, 0.3]) == [7, 3]
  assert turns.whole([2, 1]) == [2, 1]
  assert turns.whole([1 / 3, 2 / 3]) == [1, 2]
  assert turns.whole([5]) == [1]
  # Sizes, as weights: rounded to ten thousand parts, none to 0.
  rounded = turns.whole([12_423_374, 591_753, 3])
  assert rounded == [9545, 455, 1]


# --- Batches ----------------------------------------------------------------


def test_proportions(mixed):
  source, _ = opened(mixed)
  assert len(source) == 13 and not source.annotated
  component = np.array(visited(mixed, 25)) % 3  # of ids, with two data sets
  assert np.bincount(component).tolist() == [140, 60]
  for start in range(0, 190):
    assert abs((component[start : start + 10] == 1).sum() - 3) < 1
  # Through epochs of its own, each picture once in each.
  ids = np.array(visited(mixed, 25))
  for number, size in ((0, 5), (1, 8)):
    own = (ids[component == number] // 3).tolist()
    epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_belong_together(mixed):
  source, tokenizer = opened(mixed)
  records = {record["image_id"]: record for record in source}
  assert len(records) == 13
  seen = {}
  for batch in take(mixed, 40):
    for row, image_id in enumerate(batch["image_id"].tolist()):
      captions = records[image_id]["captions"]
      ids = [tokenizer.encode(c, 12)[0].tobytes() for c in captions]
      at = ids.index(batch["text"][row].tobytes())
      seen.setdefault(image_id, set()).add(at)
  # Of each picture's captions, every one is drawn at some time.
  assert all(drawn == {0, 1, 2} for drawn in seen.values())


def test_resume_hosts_and_workers(mixed):
  expected = take(mixed, 12)
  assert_equal(take(mixed, 5, start_step=7), expected[7:])
  hosts = [take(mixed, 4, host=host, num_hosts=2) for host in range(2)]
  for batch, *halves in zip(expected[:4], *hosts, strict=True):
    for key in batch:
      np.testing.assert_array_equal(
        batch[key], np.concatenate([half[key] for half in halves])
      )
  mixed.data.num_workers = 2
  assert_equal(take(mixed, 3, start_step=2), expected[2:5])
  assert_equal(
    take(mixed, 1, start_step=100_000), take(mixed, 1, start_step=100_000)
  )


def test_seeds(mixed):
  first = visited(mixed, 5)
  for field in ("seed", "data.seed"):
    other = copy.deepcopy(mixed)
    other.update_from_flattened_dict({field: 1})
    assert visited(other, 5) != first
    # The table stays: only the orders change.
    assert [i % 3 for i in visited(other, 5)] == [i % 3 for i in first]


def test_order_of_the_data_sets_is_their_own(config, write):
  """Two that are alike are not gone through in step."""
  a, b = write("a", 12), write("b", 12)
  config.data.mix = json.dumps({a: 1, b: 1})
  ids = np.array(visited(config, 12))
  assert (ids[ids % 3 == 0] // 3).tolist() != (ids[ids % 3 == 1] // 3).tolist()


def test_unreadable_ones_are_replaced_from_the_same_data_set(
  mixed, tmp_path, capsys
):
  expected = take(mixed, 20)
  (tmp_path / "a" / "3.png").write_bytes(b"?")
  actual = take(mixed, 20)
  bad = 3 * 3
  for a, b in zip(actual, expected, strict=True):
    assert bad not in a["image_id"]
    assert (a["image_id"] % 3).tolist() == (b["image_id"] % 3).tolist()
    same = b["image_id"] != bad
    for key in a:
      np.testing.assert_array_equal(a[key][same], b[key][same])
  assert "a/3.png: picture cannot be decoded" in capsys.readouterr().err


# --- Sources ----------------------------------------------------------------


def test_names_and_paths(config, write, toy_tfds):
  path = write("a", 5)
  config.data.mix = json.dumps({"toy": 1, path: 1})
  config.data.source = "/not/used.jsonl"
  source, _ = opened(config)
  assert len(source) == 25
  assert source.name == f"1/2 toy/1.0.0:train + 1/2 {path}:train"
  assert source.directory == toy_tfds / "toy" / "1.0.0"
  captions = [*source.captions()]
  assert captions[0] == "a naïve picture 0" and captions[-1] == "a 4 z"
  assert source.describe(3) == "toy/1.0.0:train[3]"
  assert source.describe(21).endswith("a/1.png")
  assert source.peers(3) == range(20) and source.peers(20) == range(20, 25)
  assert source[24]["captions"] == source.pair(24)["captions"]
  assert [r["image_id"] for r in source][19:22] == [57, 1, 4]
  copied = pickle.loads(pickle.dumps(source))
  assert copied[21] == source[21]
  (batch,) = take(config, 1)
  assert set(batch["image_id"] % 3) == {0, 1}


def test_a_folder_with_a_list(config, write, tmp_path):
  path = write("a", 5)
  (tmp_path / "a" / "pairs.jsonl").rename(tmp_path / "a" / "metadata.jsonl")
  config.data.mix = json.dumps({path.removesuffix("/pairs.jsonl"): 1})
  assert len(opened(config)[0]) == 5


def test_image_ids_do_not_collide(config, write):
  """Though both lists number their pictures alike."""
  names = {write(name, 4): 1 for name in "abcd"}
  config.data.mix = json.dumps(names)
  ids = [record["image_id"] for record in opened(config)[0]]
  assert len({*ids}) == 16
  assert all(0 <= image_id < 2**31 for image_id in ids)


def test_equal_ids_inside_a_data_set_stay_equal(config, write):
  names = {write("a", 3, image_id=2**31 - 1): 1, write("b", 2): 1}
  config.data.mix = json.dumps(names)
  ids = [record["image_id"] for record in opened(config)[0]]
  assert len({*ids[:3]}) == 1 and 0 <= ids[0] < 2**31
  assert ids[0] not in ids[3:]


def test_tokenizer_is_trained_on_all(mixed):
  _, tokenizer = opened(mixed)
  for text in ("a 3 x", "b 7 z"):
    ids, length = tokenizer.encode(text, 12)
    assert tokenizer.unk_id not in ids[:length]
  only = json.dumps({next(iter(json.loads(mixed.data.mix))): 1})
  mixed.data.mix = only
  assert opened(mixed)[1].sha256 != tokenizer.sha256


def test_fingerprint_covers_all(mixed, write):
  def fingerprint(mix):
    config = copy.deepcopy(mixed)
    config.data.mix = json.dumps(mix)
    return pipeline.data_fingerprint(*opened(config), config)["source"]

  a, b = json.loads(mixed.data.mix)
  first = fingerprint({a: 0.7, b: 0.3})
  assert fingerprint({a: 7, b: 3}) == first
  others = [
    {a: 0.6, b: 0.4},
    {b: 0.3, a: 0.7},
    {a: 1},
    {a: 7, write("c", 8): 3},
  ]
  assert len({first, *map(fingerprint, others)}) == 5


def test_without_a_mix(jsonl_config):
  source = mixture.open_training(jsonl_config.data)
  assert isinstance(source, sources.JsonlSource)


@pytest.mark.parametrize(
  "mix, says",
  [
    ("cc12m", "data.mix=cc12m is not JSON .*it is like"),
    ('["toy"]', "is not a JSON object; it is like"),
    ("{}", "is not a JSON object"),
    ('{"toy": 0}', "number of 'toy' is 0, but must be positive"),
    ('{"toy": -1}', "number of 'toy' is -1"),
    ('{"toy": "1"}', "number of 'toy' is '1'"),
    ('{"toy": true}', "number of 'toy' is True"),
    ('{"toy": NaN}', "number of 'toy' is nan"),
    ('{"toy": Infinity}', "number of 'toy' is inf"),
    ('{"toy": 1, "none": 1}', "no data set 'none'"),
    ('{"none.jsonl": 1}', "no file none.jsonl"),
  ],
)
def test_mistakes(config, toy_tfds, mix, says):
  config.data.mix = mix
  with pytest.raises(UserError, match=says) as error:
    mixture.open_training(config.data)
  assert "\n" not in str(error.value)


def noise() -> bytes:
  """A picture that no compression changes: a file has its bytes as they are."""
  pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


class Broken(Toy):
  """Its file will be damaged in picture 7."""

  name = "broken"
  counts = {"train": 20}  # noqa: RUF012

  def extra(self, index):
    return {"image": io.BytesIO(noise())} if index == 7 else {}


def test_damaged_file(config, tmp_path, monkeypatch, capsys):
  """Chunks of an ArrayRecord file that cannot be read are replaced, too."""
  build(Broken, tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  (file,) = tmp_path.rglob("*.array_record*")
  data = bytearray(file.read_bytes())
  at = data.index(noise()[5000:5100])
  data[at : at + 8] = b"\0" * 8
  file.write_bytes(data)
  config.data.name = "broken"
  source = sources.open_source(config.data, "train")
  bad = []
  for index in range(20):
    try:
      source.pair(index)
    except sources.UnreadableRecord as error:
      bad.append(index)
      assert "record cannot be read" in str(error)
  assert bad and 7 in bad
  capsys.readouterr()
  batches = take(config, 5)
  ids = np.concatenate([batch["image_id"] for batch in batches])
  assert not {*ids.tolist()} & {*bad}
  assert f"train[{bad[0]}]: record cannot be read" in capsys.readouterr().err
