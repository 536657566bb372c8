"""Alignment of attention against NumPy, on maps and boxes made by hand."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.data import motion_language, scenes_language
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _boxes, _regions, alignment, base

GRID = 4


def thing(color, shape, bbox, **more):
  size = {"size": "large", "bbox": list(bbox)}
  return {"color": color, "shape": shape, **size, **more}


class Words(fakes.Tokenizer):
  """A token a word, of which `circle` is two."""

  def pieces(self, text):
    found, at = [], 0
    for word in text.split():
      start, at = at, text.index(word, at) + len(word)
      if word == "circle":
        found += [("cir", start, at - 3), ("cle", at - 3, at)]
      else:
        found.append((word, start, at))
    return found


# ---------------------------------------------------------------- masks


def test_coverage_equals_a_fine_grid():
  rng = np.random.default_rng(0)
  for number in range(5):
    low = rng.integers(0, 40, (number, 2))
    boxes = np.hstack([low, low + rng.integers(1, 21, (number, 2))])
    fine = np.zeros((60, 60))
    for x0, y0, x1, y1 in boxes:
      fine[y0:y1, x0:x1] = 1
    expected = fine.reshape(3, 20, 5, 12).mean(axis=(1, 3))
    got = _boxes.coverage((boxes / 60).tolist(), 3, 5)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_phrases_of_a_caption():
  objects = [
    thing("red", "ring", [0, 0, 0.2, 0.2]),
    thing("red", "star", [0.4, 0.4, 0.6, 0.6]),
    thing("blue", "star", [0.8, 0.8, 1, 1]),
  ]
  caption = "a red object with a large star at the bottom right"
  first, second = _regions.phrases(scenes_language, caption, objects)
  boxes = [o["bbox"] for o in objects]
  assert first == ("a red object", 0, [boxes[:2]])
  text = "a large star at the bottom right"
  assert second == (text, caption.index(text), [boxes[2:]])
  assert caption[second.start :] == text
  assert _regions.phrases(scenes_language, "ein Stern", objects) == []
  assert _regions.phrases(scenes_language, "a green star", objects) == []


def test_phrases_of_a_clip():
  track = [[0.1 * i, 0, 0.1 * i + 0.2, 0.2] for i in range(7)]
  ring = thing("red", "ring", track[3], motion="moves right", boxes=track)
  star = thing("red", "star", track[3], motion="appears")
  star["boxes"] = [None, None, *track[2:]]
  (found,) = _regions.phrases(
    motion_language, "two red objects", [ring, star], 3
  )
  # Of seven frames the second, the middle one and the last but one.
  assert found.frames == [[track[1]], [track[3]] * 2, [track[5]] * 2]


# ------------------------------------------------------------ evaluator

OBJECTS = [
  [
    thing("red", "circle", [0, 0, 0.5, 0.5]),
    thing("blue", "star", [0.6, 0.5, 1, 0.9]),
  ],
  [
    thing("red", "circle", [0, 0, 0.96, 0.96]),  # as good as everywhere
    thing("blue", "star", [0.25, 0.25, 0.5, 0.75]),
  ],
  [thing("green", "ring", [0, 0, 1, 1])],
  [thing("green", "ring", [0, 0, 1, 0.5])],
]
CAPTION = "a red circle and a blue star"
CAPTIONS = [[CAPTION], [CAPTION], ["a green ring"], ["a hat"]]
# Tokens of the phrases; 0 is the start.
CIRCLE, STAR = [1, 2, 3, 4], [6, 7, 8]


def build(max_len=12, **fields):
  records = fakes.records(CAPTIONS, objects=OBJECTS)
  env = fakes.environment(records, Words())
  env.config.tokenizer.max_len = max_len
  return fakes.build("alignment", fakes.Attentive(), env, **fields)


def maps(seed=0, frames=1):
  shape = (len(OBJECTS), 12, frames, GRID, GRID)
  return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def mask(*boxes):
  """Each patch in 100 x 100 points."""
  points = GRID * 100
  fine = np.zeros((points, points))
  for box in boxes:
    x0, y0, x1, y1 = (round(edge * points) for edge in box)
    fine[y0:y1, x0:x1] = 1
  return fine.reshape(GRID, 100, GRID, 100).mean(axis=(1, 3))


def share(attention, mask):
  return (attention * mask).sum() / attention.sum()


def by_hand(attention, circle=CIRCLE, star=STAR):
  att, scores = attention[:, :, 0].astype(np.float64), {}
  boxes = [[o["bbox"] for o in objects] for objects in OBJECTS]
  pairs = [
    [(att[i, circle].sum(0), mask(boxes[i][0]))]
    + ([(att[i, star].sum(0), mask(boxes[i][1]))] if star else [])
    for i in (0, 1)
  ]
  pairs.append([(att[2, 1:4].sum(0), mask(boxes[2][0]))])
  for name, one in (("", share), ("_chance", lambda _, m: m.mean())):
    scores[f"local{name}"] = np.mean(
      [np.mean([one(*p) for p in picture]) for picture in pairs]
    )
    # The second picture's circle is too large, and so is the ring.
    named = [boxes[0] if star else boxes[0][:1]]
    named += [boxes[1][1:]] if star else []
    scores[f"global{name}"] = np.mean(
      [one(att[i, 0], mask(*own)) for i, own in enumerate(named)]
    )
  return scores


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_numpy(batch_size):
  got = build(batch_size=batch_size).run({"attention": maps()})
  assert got == pytest.approx(by_hand(maps()), abs=1e-6)


def test_words_that_are_cut_off_do_not_count():
  # Of 8 tokens the last is the end: a star is cut to "a", which is 6.
  got = build(max_len=8).run({"attention": maps()})
  assert got == pytest.approx(by_hand(maps(), star=[6]), abs=1e-6)
  got = build(max_len=7).run({"attention": maps()})
  assert got == pytest.approx(by_hand(maps(), star=[]), abs=1e-6)


def test_a_flat_map_scores_chance_and_none_nothing():
  got = build().run({"attention": np.full_like(maps(), 0.3)})
  for name in ("global", "local"):
    assert 0 < got[name] < 1
    assert got[name] == pytest.approx(got[f"{name}_chance"])
  for value in (0, np.nan):
    got = build().run({"attention": np.full_like(maps(), value)})
    assert got["global"] == got["local"] == 0 < got["global_chance"]


def test_attention_that_is_right_scores_one():
  attention = np.zeros_like(maps())
  attention[:2, [0, *CIRCLE], 0, 1, 1] = attention[2:] = 1
  attention[:2, STAR, 0, 2, 3] = 1
  got = build().run({"attention": attention})
  assert got["global"] == 1
  # The star of the first picture covers that patch, of the second does not.
  assert got["local"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_in_clips_each_frame_has_its_boxes():
  left, right = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
  ring = thing("red", "ring", left, motion="moves right")
  ring["boxes"] = [left, left, left, right, None, None]  # 2nd, 4th, last...
  caption = "a large red ring moves right"
  records = fakes.records([[caption]], objects=[[ring]], motion=[[]])
  records[0]["image"] = [fakes.picture(0)] * 6
  env = fakes.environment(records, Words())
  env.config.data.num_frames = 3
  attention = np.zeros((1, 8, 3, GRID, GRID), np.float32)
  attention[0, 0, :, 0, 0] = 1, 2, 4  # the first frame's is right alone
  attention[0, 1:7, :, 0, 3] = 1, 2, 4  # the second's
  got = fakes.build("alignment", fakes.Attentive(), env).run(
    {"attention": attention}
  )
  assert got == pytest.approx(
    {
      **{"global": 1 / 7, "global_chance": 1 / 3},
      **{"local": 2 / 7, "local_chance": 1 / 3},
    }
  )


def test_what_cannot_be_measured():
  with pytest.raises(UserError, match="lacks attention_maps"):
    env = fakes.environment(fakes.records(CAPTIONS, objects=OBJECTS))
    fakes.build("alignment", fakes.Matcher(), env)
  with pytest.raises(base.NotApplicableError, match="annotated objects"):
    env = fakes.environment(fakes.records(CAPTIONS))
    fakes.build("alignment", fakes.Attentive(), env)
  records = fakes.records([["a hat"]], objects=OBJECTS[:1])
  env = fakes.environment(records, Words())
  assert fakes.build("alignment", fakes.Attentive(), env).run({}) == {}
  assert alignment.score(np.zeros((1, 2, 2)), np.ones((1, 2, 2))) == 0
