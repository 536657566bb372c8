"""Captioning and the probes, on scenes whose truth is plain."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.data import scenes_language
from vlp_jax.evaluators import _truth, captioning

LEFT, RIGHT = [0.0, 0.4, 0.2, 0.6], [0.8, 0.4, 1.0, 0.6]


def scene(*things):
  return [
    {"color": c, "shape": s, "size": "large", "bbox": box}
    for c, s, box in things
  ]


OBJECTS = [
  scene(("red", "circle", LEFT), ("blue", "star", RIGHT)),
  scene(("blue", "circle", LEFT), ("red", "star", RIGHT)),
  scene(("green", "ring", RIGHT)),
]
CAPTIONS = [
  ["a red circle and a blue star", "a red circle left of a blue star"],
  ["a blue circle and a red star"],
  ["a green ring"],
]


def test_captioning_counts_truth_and_equality():
  written = [
    "a red  circle left of a blue star",  # equal but for the space
    "a circle and a star",  # true, of picture 0 as well, not equal
    "ring green a",  # not in the grammar
  ]
  env = fakes.environment(
    fakes.records(CAPTIONS, objects=OBJECTS), fakes.Tokenizer(written)
  )
  evaluator = fakes.build("captioning", fakes.Captioner(), env, batch_size=2)
  got = evaluator.run({"caption": np.array([1, 2, 3], np.int32)})
  assert got["exact"] == pytest.approx(1 / 3)
  assert got["true"] == pytest.approx(2 / 3)
  assert got["exact_chance"] == 0
  # 6 moves to another picture; only the second caption is true of another.
  assert got["true_chance"] == pytest.approx(1 / 6)
  assert [s["true"] for s in evaluator.samples] == [True, True, False]
  assert evaluator.samples[0]["references"] == CAPTIONS[0]


def test_captioning_without_annotations():
  env = fakes.environment(
    fakes.records([["Ein Bär."], ["日本"]]), fakes.Tokenizer(["ein bär", "x"])
  )
  evaluator = fakes.build("captioning", fakes.Captioner(), env)
  got = evaluator.run({"caption": np.array([1, 2], np.int32)})
  assert got["exact"] == 0.5 and "true" not in got
  assert evaluator.samples[0]["true"] is None


def test_words():
  assert captioning.words("A dog's (big) Ball, 3 m.") == [
    *("a", "dog's", "big", "ball", "3", "m")
  ]


def test_likeness_is_that_of_equal_and_of_other_captions():
  pytest.importorskip("pycocoevalcap")
  texts = ["a red circle and a blue star", "two large dogs run on the grass"]
  same = captioning.likeness(texts, [[t, "nothing"] for t in texts])
  assert same["bleu4"] == pytest.approx(1, abs=1e-6)
  other = captioning.likeness(texts, [[t] for t in texts[::-1]])
  assert other["bleu4"] < 1e-3 and other["cider"] < same["cider"]


def test_moved_rate_visits_every_other_picture():
  seen = []
  owner = [0, 0, 1, 2, 3, 4]
  _truth.moved_rate(lambda t, p: seen.append((t, p)) or True, owner)
  assert sorted(seen) == [
    (t, p) for t in range(6) for p in range(5) if p != owner[t]
  ]


def test_bag_vectors_are_the_bag_scores():
  from vlp_jax.data import scenes_probes as probes

  texts = [text for texts in CAPTIONS for text in texts]
  image, text = _truth.bag_vectors(scenes_language, OBJECTS, texts)
  bag = probes.bag_of_attributes
  np.testing.assert_array_equal(
    text @ image.T,
    probes.bag_scores(
      np.stack([bag(t) for t in texts]), np.stack([bag(o) for o in OBJECTS])
    ),
  )


PAIRS = [
  [
    {
      "true": "a red circle and a blue star",
      "false": "a blue circle and a red star",
    }
  ],
  [
    {
      "true": "a blue circle and a red star",
      "false": "a red circle and a blue star",
    },
    {"true": "a blue circle", "false": "a green ring"},
  ],
  [],
]
TEXTS = [
  *("a red circle and a blue star", "a blue circle and a red star"),
  *("a blue circle", "a green ring"),
]


@pytest.mark.parametrize("kind", ["binding", "relation"])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_probes_count_wins_and_halve_ties(kind, batch_size):
  none = [[], [], []]
  records = fakes.records(
    CAPTIONS,
    objects=OBJECTS,
    binding=PAIRS if kind == "binding" else none,
    relation=PAIRS if kind == "relation" else none,
  )
  env = fakes.environment(records, fakes.Tokenizer(TEXTS))
  evaluator = fakes.build(kind, fakes.Captioner(), env, batch_size=batch_size)
  e = np.eye(5, dtype=np.float32)
  score = np.zeros((3, 5), np.float32)
  score[0, 1] = -1  # the false text of picture 0 wins
  score[1, 4] = -1  # the true text wins; the other pair ties
  params = {
    "image": np.stack([e[1], e[2], e[4]]),
    "text": np.stack([e[0], e[1], e[2], e[3], e[3]]),
    "score": score,
  }
  got = evaluator.run(params)
  # Won, won, tied.
  assert got["contrastive"] == pytest.approx(2.5 / 3)
  assert got["captioner"] == pytest.approx((0 + 0.5 + 1) / 3)
  # Bags: two swaps tie, and nothing green is in picture 1.
  assert got["bag"] == pytest.approx((0.5 + 0.5 + 1) / 3)
  assert got["contrastive_chance"] == got["captioner_chance"] == 0.5


def test_probe_of_a_method_without_captioner():
  records = fakes.records(
    CAPTIONS, objects=OBJECTS, binding=PAIRS, relation=PAIRS
  )
  env = fakes.environment(records, fakes.Tokenizer(TEXTS))
  evaluator = fakes.build("binding", fakes.Dual(), env)
  ones = np.ones((5, 2), np.float32)
  got = evaluator.run({"image": ones, "text": ones})
  assert got["contrastive"] == 0.5 and "captioner" not in got


@pytest.mark.parametrize("batch_size", [1, 3])
def test_probes_ask_the_matching_head(batch_size, monkeypatch):
  records = fakes.records(
    CAPTIONS, objects=OBJECTS, binding=PAIRS, relation=PAIRS
  )
  env = fakes.environment(records, fakes.Tokenizer(TEXTS))
  match = np.zeros((3, 5), np.float32)
  match[0, 1], match[0, 2] = -2, -1  # the false text of picture 0 wins
  match[1, 4] = -1  # the true text wins; the other pair ties
  ones = np.ones((5, 2), np.float32)
  params = {"image": ones, "text": ones, "match": match}
  seen = fakes.watch_states(monkeypatch)
  for kind in ("binding", "relation"):
    seen.clear()
    evaluator = fakes.build(kind, fakes.Matcher(), env, batch_size=batch_size)
    got = evaluator.run(params)
    assert got["matching"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert got["matching_chance"] == 0.5
    # One state for both pairs of picture 1, none for picture 2.
    pictures = [number for batch in seen for number in batch]
    padding = -len(set(pictures)) % batch_size
    assert pictures == [1, 0] + [0] * padding
  got = fakes.build("binding", fakes.Dual(), env).run(params)
  assert "matching" not in got
