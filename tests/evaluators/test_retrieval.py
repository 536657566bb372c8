"""Retrieval against a brute force that breaks ties by counting orders."""

import collections
import fractions
import itertools
import math

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.errors import UserError
from vlp_jax.evaluators.retrieval import median_rank, rank_all, recall

RNG = np.random.default_rng


def brute_force(scores, right, k):
  """Expected recall at k of each row: all orders of tied keys, by counting.

  Draws k keys of the sorted row where a tie goes uniformly; the chance that
  no right one is drawn is counted over all subsets of the tie.
  """
  out = []
  for row, good in zip(scores, right, strict=True):
    levels = sorted(set(row), reverse=True)
    left, value = k, 0.0
    for level in levels:
      members = [i for i in range(len(row)) if row[i] == level]
      if left <= 0:
        break
      if len(members) <= left:
        left -= len(members)
        if any(good[i] for i in members):
          value = 1.0
          break
        continue
      draws = list(itertools.combinations(members, left))
      value = np.mean([any(good[i] for i in draw) for draw in draws])
      break
    out.append(value)
  return np.array(out)


def median_by_counting(scores, right):
  """Median of the ranks of all rows, each order of a tie counted alike."""
  weights = collections.Counter()
  for row, good in zip(scores, right, strict=True):
    row = np.where(np.isnan(row), -np.inf, row)
    best = row[good].max()
    tie = int((row == best).sum())
    places = itertools.combinations(range(tie), int((row == best)[good].sum()))
    places = [own[0] for own in places]  # of the first right key in the tie
    for place in places:
      rank = 1 + int((row > best).sum()) + place
      weights[rank] += fractions.Fraction(1, len(places))
  # To whole numbers, which NumPy can repeat.
  scale = math.lcm(*(share.denominator for share in weights.values()))
  ranks = sorted(weights)
  passed = np.cumsum([int(weights[rank] * scale) for rank in ranks])
  middle = (int(passed[-1]) - 1) // 2, int(passed[-1]) // 2
  return np.mean([ranks[np.searchsorted(passed, i + 1)] for i in middle])


def tied_case(seed, pictures=9, captions=(1, 2, 3)):
  """Embeddings of few values, so that there are many exact ties."""
  rng = RNG(seed)
  count = rng.choice(captions, pictures)
  image = rng.integers(-1, 2, (pictures, 3)).astype(np.float32)
  text = rng.integers(-1, 2, (count.sum(), 3)).astype(np.float32)
  return image, text, np.repeat(np.arange(pictures), count), count


def build(count, captions="all", **fields):
  numbers = iter(range(1, 1 + sum(count)))
  texts = [[f"text {next(numbers)}" for _ in range(n)] for n in count]
  tokenizer = fakes.Tokenizer([t for ts in texts for t in ts])
  env = fakes.environment(fakes.records(texts), tokenizer)
  return fakes.build(
    "retrieval", fakes.Dual(), env, captions=captions, **fields
  )


def params_of(image, text):
  """Text 0 is the empty one."""
  blank = np.zeros((1, text.shape[1]), np.float32)
  return {"image": image, "text": np.vstack([blank, text])}


def evaluate(image, text, count, **fields):
  return build(count, **fields).run(params_of(image, text))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_size", [3, 128])
def test_recalls_equal_brute_force(seed, batch_size):
  image, text, owner, count = tied_case(seed)
  got = evaluate(image, text, count, batch_size=batch_size)
  scores = image @ text.T
  right = owner[None] == np.arange(len(image))[:, None]
  for k in (1, 5, 10):
    i2t = brute_force(scores, right, k).mean()
    t2i = brute_force(scores.T, right.T, k).mean()
    assert got[f"i2t_r{k}"] == pytest.approx(i2t, abs=1e-12)
    assert got[f"t2i_r{k}"] == pytest.approx(t2i, abs=1e-12)
  for mean, way in (("mtr", "i2t"), ("mir", "t2i")):
    assert got[mean] == pytest.approx(
      np.mean([got[f"{way}_r{k}"] for k in (1, 5, 10)])
    )
  assert got["i2t_median_rank"] == median_by_counting(scores, right)
  assert got["t2i_median_rank"] == median_by_counting(scores.T, right.T)


@pytest.mark.parametrize("pictures", [8, 9])
def test_median_rank_is_numpy_s(pictures):
  rng, count = RNG(pictures), np.array([1, 2, 3] * 3)[:pictures]
  image = rng.normal(size=(pictures, 5)).astype(np.float32)
  text = rng.normal(size=(count.sum(), 5)).astype(np.float32)
  got = evaluate(image, text, count)
  right = np.arange(pictures)[:, None] == np.repeat(np.arange(pictures), count)
  for way, scores, good in (
    ("i2t", image @ text.T, right),
    ("t2i", text @ image.T, right.T),
  ):
    best = np.where(good, scores, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + (scores > best).sum(axis=1)
    assert got[f"{way}_median_rank"] == np.median(ranks)
    assert len(set(ranks)) > 2


def test_the_middle_of_a_tie():
  assert median_rank([2], [6], [1]) == 6  # of 3 to 9
  assert median_rank([0], [5], [1]) == 3.5  # of 1 to 6
  # Orders of RRW, RWR, WRR: the first right one is the first, twice.
  assert median_rank([0], [1], [2]) == 1
  assert median_rank([0, 3], [0, 0], [1, 1]) == 2.5
  # 1 for sure, and 1 to 4: the first is more than half.
  assert median_rank([0, 0], [0, 3], [1, 1]) == 1


@pytest.mark.parametrize("value", [0.3, np.nan])
def test_constant_embedding_scores_chance(value):
  _, text, _, count = tied_case(0, pictures=30)
  image = np.full((30, 3), value, np.float32)
  got = evaluate(image, np.full_like(text, 0.5), count)
  for name in [n for n in got if not n.endswith("_chance")]:
    assert got[name] == pytest.approx(got[f"{name}_chance"], abs=1e-12), name
  assert got["t2i_r5"] == pytest.approx(5 / 30)


def test_chance_is_what_random_embeddings_score():
  rng, count = RNG(0), np.array([1, 2, 5] * 10)
  evaluator = build(count, batch_size=128)
  runs = [
    evaluator.run(
      params_of(
        fakes.unit(rng.normal(size=(30, 8))),
        fakes.unit(rng.normal(size=(count.sum(), 8))),
      )
    )
    for _ in range(30)
  ]
  for k in (1, 5, 10):
    got = np.mean([run[f"i2t_r{k}"] for run in runs])
    assert got == pytest.approx(runs[0][f"i2t_r{k}_chance"], abs=0.06)
  # Of 80 captions 1, 2 or 5 are right: x = 21 / 80 solves
  # x + 1 - (1 - x)^2 + 1 - (1 - x)^5 = 3 / 2, but for rounding.
  for way, chance in (("i2t", 21), ("t2i", 15.5)):
    name = f"{way}_median_rank"
    assert runs[0][f"{name}_chance"] == chance
    got = np.mean([run[name] for run in runs])
    assert got == pytest.approx(runs[0][f"{name}_chance"], abs=1.5)


def test_first_caption_only():
  eye = np.eye(4, dtype=np.float32)
  # Two captions a picture, the second ones belong elsewhere.
  text = np.stack([eye, eye[::-1]], axis=1).reshape(8, 4)
  got = evaluate(eye, text, [2] * 4, captions="first")
  assert got["i2t_r1"] == got["t2i_r1"] == 1
  got = evaluate(eye, text, [2] * 4, captions="all")
  assert got["i2t_r1"] < 1 and got["t2i_r1"] == 0.5
  with pytest.raises(UserError, match="'first' or 'all'"):
    evaluate(eye, text, [2] * 4, captions="some")


@pytest.mark.parametrize("max_scores", [1, 40, 10**6])
def test_chunks_change_nothing(max_scores):
  image, text, owner, _ = tied_case(1, pictures=23)
  mesh = fakes.environment(fakes.records([["a"]])).mesh
  pictures = np.arange(23)
  whole = rank_all(image, text, pictures, owner, mesh=mesh)
  chunked = rank_all(
    image, text, pictures, owner, mesh=mesh, max_scores=max_scores
  )
  np.testing.assert_array_equal(whole, chunked)


def test_recall_of_several_right_keys_in_a_tie():
  # 2 of 4 tied keys are right, one place is left: one half.
  assert recall([0], [2], [2], 1)[0] == pytest.approx(1 / 2)
  # Two places: 1 - (2/4)(1/3).
  assert recall([3], [2], [2], 5)[0] == pytest.approx(5 / 6)
  assert recall([5], [0], [1], 5)[0] == 0
  assert recall([4], [0], [1], 5)[0] == 1


def test_a_score_that_is_no_number_is_a_miss():
  image = text = np.eye(3, dtype=np.float32)
  image = np.where(np.arange(3)[:, None] == 1, np.nan, image)
  got = evaluate(image, text, [1, 1, 1])
  assert got["t2i_r1"] == pytest.approx(2 / 3)
  # All texts tie for that picture: one in three, by lot.
  assert got["i2t_r1"] == pytest.approx((2 + 1 / 3) / 3)


def test_unreadable_picture_keeps_the_others_in_place():
  texts = [f"text {i}" for i in range(1, 5)]
  records = fakes.records([[text] for text in texts])
  records[1]["image"] = b"no picture"  # stands as a black one, like picture 0
  env = fakes.environment(records, fakes.Tokenizer(texts))
  evaluator = fakes.build("retrieval", fakes.Dual(), env, batch_size=3)
  eye = np.eye(4, dtype=np.float32)
  got = evaluator.run({"image": eye, "text": np.vstack([0 * eye[:1], eye])})
  # Captions 2 and 3 are found; 0 fits two pictures, and 1 none of the four.
  assert got["i2t_r1"] == 0.75
  assert got["t2i_r1"] == pytest.approx((1 / 2 + 1 / 4 + 2) / 4)


def scene(*things):
  return [
    {"color": c, "shape": s, "size": "large", "bbox": box}
    for c, s, box in things
  ]


LEFT, RIGHT = [0.0, 0.4, 0.2, 0.6], [0.8, 0.4, 1.0, 0.6]


def test_truth_and_bags_on_annotated_pictures():
  objects = [
    scene(("red", "circle", LEFT)),
    scene(("red", "circle", LEFT), ("blue", "star", RIGHT)),
    scene(("blue", "circle", LEFT), ("red", "star", RIGHT)),
    scene(("green", "ring", RIGHT)),
  ]
  texts = [
    ["a red circle"],
    ["a red circle and a blue star"],
    ["a blue circle and a red star"],
    ["a green ring"],
  ]
  flat = [t[0] for t in texts]
  env = fakes.environment(
    fakes.records(texts, objects=objects), fakes.Tokenizer(flat)
  )
  evaluator = fakes.build("retrieval", fakes.Dual(), env)
  eye = np.eye(4, dtype=np.float32)
  # Every picture finds the first caption: true of two of the four.
  image = np.ones((4, 4), np.float32) + eye[:1]
  text = np.vstack([np.zeros((1, 4), np.float32), eye])
  got = evaluator.run({"image": image, "text": text})
  assert got["caption_true"] == 0.5
  # A caption's pictures tie: the first counts, and three are not true of it.
  assert got["image_true"] == 0.25
  # Moved to each of three others: only caption 0 is true of one more.
  assert got["caption_true_chance"] == pytest.approx(1 / 12 * 3 / 4 + 1 / 4)
  # Bags cannot tell pictures 1 and 2 apart, and know all others.
  assert got["i2t_r1_bag"] == got["t2i_r1_bag"] == pytest.approx(3 / 4)
  assert got["i2t_r5_bag"] == 1
  from vlp_jax.data import scenes_probes

  records = [
    {"captions": t, "objects": o, "binding": [], "relation": []}
    for t, o in zip(texts, objects, strict=True)
  ]
  baseline = scenes_probes.bag_baseline(records)
  assert baseline["t2i_r1"] == pytest.approx(got["t2i_r1_bag"])


def test_embeddings_are_computed_once_for_each_params():
  rng = RNG(0)
  texts = [[f"text {i}"] for i in range(1, 6)]
  env = fakes.environment(fakes.records(texts))
  method = fakes.Dual()
  evaluators = [
    fakes.build("retrieval", method, env, captions=captions)
    for captions in ("first", "all")
  ]
  params = {
    "image": fakes.unit(rng.normal(size=(5, 4))),
    "text": fakes.unit(rng.normal(size=(9, 4))),
  }
  first = evaluators[0].encode_images(params)
  assert evaluators[1].encode_images(params) is first
  other = {**params, "image": params["image"] * 2}
  np.testing.assert_allclose(evaluators[0].encode_images(other), 2 * first)
  assert method.calls == 1  # traced once, whatever the parameters


def test_many_devices_give_the_same():
  rng, texts = RNG(0), [f"text {k}" for k in range(1, 24)]
  image, text = rng.integers(-1, 2, (2, 23, 3)).astype(np.float32)
  results = []
  for devices in (1, 4):
    env = fakes.environment(
      fakes.records([[t] for t in texts]), fakes.Tokenizer(texts), devices
    )
    evaluator = fakes.build("retrieval", fakes.Dual(), env, batch_size=6)
    results.append(evaluator.run(params_of(image, text)))
  assert results[0] == results[1]
