"""Two-stage retrieval against a brute force that scores every pair."""

import jax
import numpy as np
import pytest

from tests.evaluators import fakes
from tests.evaluators.test_retrieval import (
  LEFT,
  brute_force,
  median_by_counting,
  scene,
)
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _matching
from vlp_jax.evaluators.reranking import nearest, ranks
from vlp_jax.evaluators.retrieval import recall

RNG = np.random.default_rng


def case(seed, count, levels=0):
  """Random embeddings and match scores; few levels make many ties."""
  rng = RNG(seed)
  pictures, texts = len(count), sum(count)
  match = rng.normal(size=(pictures, texts + 1)).astype(np.float32)
  if levels:
    match = rng.integers(0, levels, match.shape).astype(np.float32)
  return {
    "image": fakes.unit(rng.normal(size=(pictures, 4))),
    "text": fakes.unit(rng.normal(size=(texts + 1, 4))),
    "match": match,
  }


def build(count, devices=1, method=None, **fields):
  numbers = iter(range(1, 1 + sum(count)))
  texts = [[f"text {next(numbers)}" for _ in range(n)] for n in count]
  tokenizer = fakes.Tokenizer([t for ts in texts for t in ts])
  env = fakes.environment(fakes.records(texts), tokenizer, devices)
  method = method or fakes.Matcher()
  fields = {"captions": "all", "batch_size": 4} | fields
  return fakes.build("reranking", method, env, **fields)


def only_best(cosine, match, k):
  """Match scores of each row's k best keys by cosine, -inf for the others."""
  out = np.full(match.shape, -np.inf)
  for i, row in enumerate(cosine):
    for j in sorted(range(len(row)), key=lambda j: -row[j])[:k]:
      out[i, j] = -np.inf if np.isnan(match[i, j]) else match[i, j]
  return out


def by_brute_force(params, count, k):
  owner = np.repeat(np.arange(len(count)), count)
  cosine = params["image"] @ params["text"][1:].T
  match = params["match"][:, 1:]
  right = owner[None] == np.arange(len(count))[:, None]
  i2t = only_best(cosine, match, k)
  t2i = only_best(cosine.T, match.T, k)
  found = {}
  for way, scores, good in (("i2t", i2t, right), ("t2i", t2i, right.T)):
    for n in (1, 5, 10):
      found[f"{way}_r{n}"] = brute_force(scores, good, n).mean()
    found[f"{way}_median_rank"] = median_by_counting(scores, good)
  return found


COUNT = [1, 2, 3, 1, 1, 2, 3, 2, 1]


@pytest.mark.parametrize("k", [1, 3, 6, 100])
@pytest.mark.parametrize(("seed", "levels"), [(0, 0), (1, 3)])
def test_equals_brute_force(k, seed, levels):
  params = case(seed, COUNT, levels)
  got = build(COUNT, k=k).run(params)
  want = by_brute_force(params, COUNT, k)
  for name, value in want.items():
    assert got[name] == pytest.approx(value, abs=1e-12), name
  for mean, way in (("mtr", "i2t"), ("mir", "t2i")):
    assert got[mean] == pytest.approx(
      np.mean([want[f"{way}_r{n}"] for n in (1, 5, 10)])
    )
  plain = build(COUNT).run(case(0, COUNT))
  assert {n: v for n, v in got.items() if n.endswith("_chance")} == {
    n: v for n, v in plain.items() if n.endswith("_chance")
  }
  assert got["t2i_r1_chance"] == pytest.approx(1 / 9)


def test_all_candidates_is_matching_alone():
  params = case(2, COUNT)
  owner = np.repeat(np.arange(9), COUNT)
  match = params["match"][:, 1:]
  got = build(COUNT, k=16).run(params)
  best = (match.argmax(axis=1)[:, None] == np.arange(16)) & (
    owner == np.arange(9)[:, None]
  )
  assert got["i2t_r1"] == best.any(axis=1).mean()
  assert got["t2i_r1"] == (match.argmax(axis=0) == owner).mean()
  # The cosines do not matter any more.
  other = params | {"image": params["image"][::-1]}
  assert build(COUNT, k=16).run(other) == got
  assert build(COUNT, k=2).run(other) != build(COUNT, k=2).run(params)


def test_one_candidate_is_cosine_alone():
  params = case(3, COUNT)
  got = build(COUNT, k=1).run(params)
  owner = np.repeat(np.arange(9), COUNT)
  cosine = params["image"] @ params["text"][1:].T
  right_text = owner[cosine.argmax(axis=1)] == np.arange(9)
  # Of a picture without its candidate, no text but the candidate is last.
  own = np.array(COUNT)
  assert got["i2t_r1"] == right_text.mean()
  miss = recall(np.ones(9), 15 - own, own, 5)
  assert got["i2t_r5"] == pytest.approx(np.where(right_text, 1, miss).mean())
  assert got["t2i_r1"] == (cosine.argmax(axis=0) == owner).mean()


@pytest.mark.parametrize("tile", [1, 2, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 9, 20])
def test_each_picture_has_one_state_and_shapes_change_nothing(
  batch_size, tile, monkeypatch
):
  params, method = case(4, COUNT), fakes.Matcher()
  evaluator = build(COUNT, method=method, k=3, batch_size=batch_size)
  evaluator.tile = tile
  seen = fakes.watch_states(monkeypatch)
  got = evaluator.run(params)
  assert got == build(COUNT, k=3).run(params)
  pictures = [
    number for batch in seen[: -(-9 // batch_size)] for number in batch
  ]
  assert sorted(pictures[:9]) == list(range(9))
  assert len(pictures) == 9 + -9 % batch_size
  assert method.traced == 1  # one shape, so one compile


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_picture_with_many_texts_counts_as_several(most, monkeypatch):
  params = case(4, COUNT)
  expected = build(COUNT, k=5).run(params)
  monkeypatch.setattr(_matching, "MOST_TEXTS", most)
  seen = fakes.watch_states(monkeypatch)
  assert build(COUNT, k=5, batch_size=4).run(params) == expected
  numbers = np.concatenate(seen)
  assert len(numbers) > 9 and set(numbers.tolist()) == set(range(9))


@pytest.mark.parametrize("devices", [2, 8])
def test_many_devices_give_the_same(devices):
  count = [1] * 23
  params = case(5, count)
  one, many = (
    build(count, devices=n, k=5, batch_size=6).run(params) for n in (1, devices)
  )
  assert one == many
  assert 0 < one["i2t_r5"] < 1


def test_captions_that_are_the_same_are_one_candidate():
  texts = [["a"], ["a", "b"], ["b"], ["c"], ["a"]]
  env = fakes.environment(fakes.records(texts), fakes.Tokenizer("abc"))
  evaluator = fakes.build(
    "reranking", fakes.Matcher(), env, captions="all", k=1, batch_size=2
  )
  eye = np.eye(4, dtype=np.float32)
  image = eye[[1, 2, 2, 3, 3]]  # finds a, b, b, c, c
  match = np.zeros((5, 4), np.float32)
  got = evaluator.run({"image": image, "text": eye, "match": match})
  # Of a's three captions one is picture 0's, of b's two one is picture 1's
  # and one picture 2's; picture 3 has c alone, and 4 does not find its a.
  assert got["i2t_r1"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 + 0) / 5)
  # a finds 0, b finds 1 (2 is as near, but comes later), c finds 3.
  assert got["t2i_r1"] == pytest.approx((1 + 0 + 1 + 0 + 1 + 0) / 6)


def test_scores_that_are_no_numbers():
  params = case(6, COUNT)
  broken = params | {"match": np.full_like(params["match"], np.nan)}
  got = build(COUNT, k=4).run(broken)
  for name in [n for n in got if not n.endswith("_chance")]:
    assert got[name] == pytest.approx(got[f"{name}_chance"], abs=1e-12), name
  params["match"][2:5] = np.nan
  got = build(COUNT, k=4).run(params)
  want = by_brute_force(params, COUNT, 4)
  assert {name: got[name] for name in want} == pytest.approx(want)


def test_a_picture_whose_embedding_is_no_number_is_nobodys_candidate():
  count = [1] * 6
  params = case(7, count)
  params["image"][0] = np.nan
  params["match"][0] = 99  # it would win everywhere
  got = build(count, k=2).run(params)
  cosine = params["image"][1:] @ params["text"][1:].T
  best = 1 + only_best(cosine.T, params["match"][1:, 1:].T, 2).argmax(axis=1)
  assert got["t2i_r1"] == pytest.approx(np.mean(best == np.arange(6)))


def test_nearest_and_its_ties():
  mesh = fakes.environment(fakes.records([["a"]])).mesh
  keys = np.float32([[1, 0], [0, 1], [1, 0], [np.nan, 0], [0.6, 0.8]])
  queries = np.float32([[1, 0], [0, 1]])
  # Key 0 comes before key 2, which differs by less than a tie.
  keys[2, 0] += 1e-7
  got = nearest(queries, keys, 3, mesh=mesh)
  np.testing.assert_array_equal(got[0], [0, 2, 4])
  np.testing.assert_array_equal(got[1], [1, 4, 0])
  assert nearest(queries, keys, 99, mesh=mesh).shape == (2, 5)


def test_ranks_of_candidates_that_stand_for_several():
  got = ranks(
    np.float32([[3, 2, 2, 1], [3, 2, 1, 0], [np.nan] * 4]),
    np.array([[0, 1, 2, 1], [0, 0, 0, 0], [1, 0, 0, 0]]),
    np.array([[4, 1, 0, 5], [1, 1, 1, 2], [0, 1, 1, 1]]),
    np.array([4, 2, 3]),
    np.array([20, 9, 7]),
  )
  np.testing.assert_array_equal(got, [[4, 5, 0], [1, 4, 7], [3, 2, 3]])


def test_truth_of_what_comes_first():
  objects = [
    scene(("red", "circle", LEFT)),
    scene(("blue", "star", LEFT)),
  ]
  texts = ["a red circle", "a blue star"]
  env = fakes.environment(
    fakes.records([[t] for t in texts], objects=objects),
    fakes.Tokenizer(texts),
  )
  evaluator = fakes.build("reranking", fakes.Matcher(), env)
  params = {
    "image": np.eye(2, dtype=np.float32),
    "text": np.eye(3, 2, -1, dtype=np.float32),
    # Both pictures take the star; both texts take picture 0.
    "match": np.float32([[0, 5, 6], [0, 1, 2]]),
  }
  got = evaluator.run(params)
  assert got["i2t_r1"] == got["t2i_r1"] == 0.5
  assert got["caption_true"] == got["image_true"] == 0.5
  assert got["i2t_r1_bag"] == 1


def test_says_what_is_wrong():
  with pytest.raises(UserError, match="field k is 0"):
    build([1], k=0)
  with pytest.raises(UserError, match="reranking's field captions"):
    build([1], captions="some")
  with pytest.raises(UserError, match="lacks match_state, match_score"):
    build([1], method=fakes.Dual())
  assert len(jax.devices()) == 8
