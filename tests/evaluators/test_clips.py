"""Evaluations of clips: truth, probes and baselines that know of motions."""

import pickle

import numpy as np
import pytest

from tests import toys
from tests.evaluators import fakes
from vlp_jax.data import motion_generate, motion_language, scenes_probes
from vlp_jax.evaluators import _truth, base

FRAMES = 3
LEFT, RIGHT = "a red circle moves left", "a red circle moves right"


def thing(motion, color="red", shape="circle"):
  boxes = [[0.1 * i, 0, 0.1 * i + 0.2, 0.2] for i in range(5)]
  return {
    **{"color": color, "shape": shape, "size": "large", "motion": motion},
    **{"bbox": boxes[2], "boxes": boxes},
  }


OBJECTS = [
  [thing("moves left")],
  [thing("moves right")],
  [thing("moves left"), thing("stays", "blue", "star")],
  [thing("stays"), thing("moves left", "blue", "star")],
]
CAPTIONS = [
  [LEFT],
  [RIGHT],
  ["a red circle moves left and a blue star stays"],
  ["a red circle stays and a blue star moves left"],
]
NONE = [[], [], [], []]
TEXTS = [texts[0] for texts in CAPTIONS]


def setting(**annotations):
  fields = {"objects": OBJECTS, "motion": NONE, "binding": NONE} | annotations
  records = fakes.records(CAPTIONS, **fields)
  for i, record in enumerate(records):
    record["image"] = [fakes.picture(i)] * 5
  env = fakes.environment(records, fakes.Tokenizer(TEXTS))
  env.config.data.num_frames = FRAMES
  return env


def test_retrieval_knows_motions():
  evaluator = fakes.build("retrieval", fakes.Dual(), setting())
  eye = np.eye(4, dtype=np.float32)
  # Every clip finds "moves left", which is true of the first and the third.
  image = np.ones((4, 4), np.float32) + eye[:1]
  text = np.vstack([np.zeros((1, 4), np.float32), eye])
  got = evaluator.run({"image": image, "text": text})
  assert got["caption_true"] == 0.5
  # Who knows motions, and not whose: two clips of four are told apart.
  assert got["i2t_r1_bag"] == got["t2i_r1_bag"] == pytest.approx(3 / 4)
  assert got["t2i_median_rank_bag"] == 1


def test_captions_of_clips_are_judged():
  env = setting()
  env.tokenizer.texts += ["a circle moves left", "a circle moves", "a star"]
  evaluator = fakes.build("captioning", fakes.Captioner(), env)
  got = evaluator.run({"caption": np.array([5, 5, 6, 7], np.int32)})
  assert got["true"] == 2 / 4  # the first, and the last


@pytest.mark.parametrize("kind", ["binding", "motion"])
def test_probes(kind):
  reverse = [{"true": TEXTS[0], "false": TEXTS[1]}]
  exchange = [{"true": TEXTS[2], "false": TEXTS[3]}]
  pairs = {"motion": [reverse, [], [], []], "binding": [[], [], exchange, []]}
  evaluator = fakes.build(kind, fakes.Matcher(), setting(**pairs))
  match = np.zeros((4, 5), np.float32)
  match[0, 2] = match[2, 3] = 1  # right of the exchange alone
  ones = np.ones((5, 2), np.float32)
  got = evaluator.run({"image": ones, "text": ones, "match": match})
  expected = {
    **{"contrastive": 0.5, "contrastive_chance": 0.5, "matching_chance": 0.5},
    "matching": {"motion": 0, "binding": 1}[kind],
    # A bag has no "moves right", and knows not who moves.
    "bag": {"motion": 1, "binding": 0.5}[kind],
  }
  if kind == "motion":
    expected["one_frame"] = 0.5
  assert got == expected


def test_bags_of_generated_clips():
  spec = motion_generate.SPECS["debug"]
  examples = [motion_generate.example(spec, "train", i) for i in range(60)]
  pairs = [pair for e in examples for pair in e["binding"]]
  assert len(pairs) > 10

  def bag(what):
    return scenes_probes.bag_of_attributes(what, motion_language)

  for pair in pairs:
    np.testing.assert_array_equal(bag(pair["true"]), bag(pair["false"]))
  texts = [text for e in examples for text in e["captions"]]
  objects = [e["objects"] for e in examples]
  image, text = _truth.bag_vectors(motion_language, objects, texts)
  known = np.stack([bag(o) for o in objects])
  assert known.shape == (60, 6 + 6 + 10)
  np.testing.assert_array_equal(
    text @ image.T,
    scenes_probes.bag_scores(np.stack([bag(t) for t in texts]), known),
  )
  with pytest.raises(ValueError, match="not a caption of motion_language"):
    bag("a red circle on the left")


def test_what_needs_other_annotations_is_left_out():
  clips = setting()
  for kind, field in (("pointing", "phrases"), ("relation", "relation")):
    message = f"needs records with {field}, and those of 'fake' have none"
    with pytest.raises(base.NotApplicableError, match=message):
      fakes.build(kind, fakes.Captioner(), clips)
  pictures = fakes.environment(fakes.records(CAPTIONS, objects=OBJECTS))
  with pytest.raises(base.NotApplicableError, match="with motion, and those"):
    fakes.build("motion", fakes.Dual(), pictures)


def test_the_config_of_scl_serves_pictures_and_clips(monkeypatch):
  fields = {"objects": OBJECTS, "binding": NONE, "relation": NONE}
  records = fakes.records(CAPTIONS, phrases=NONE, **fields)
  films = setting().source("test")
  monkeypatch.setattr(base.sources, "open_source", lambda *_: films)
  both = {"retrieval", "reranking", "binding"}
  pictures = both | {"zeroshot", "alignment", "pointing", "relation"}
  for name, clips in (("", set()), ("films", both | {"motion"})):
    env = fakes.environment(records)
    env.config.evals = toys.config("scl").evals
    env.config.clips.name = name
    built = base.build_all(toys.method("scl"), env).values()
    for of_clips, types in ((False, pictures), (True, clips)):
      found = {e.config.type for e in built if e.config.clips is of_clips}
      assert found == types


def test_workers_can_have_a_part_of_a_source():
  part = fakes.build("retrieval", fakes.Dual(), setting()).source
  copy = pickle.loads(pickle.dumps(part))
  assert copy.annotated and copy.language is motion_language


def test_evaluations_of_clips_in_a_run_on_pictures(monkeypatch):
  env, films = fakes.environment(fakes.records([["a"]])), setting()
  with pytest.raises(base.NotApplicableError, match=r"config\.clips\.name"):
    fakes.build("retrieval", fakes.Dual(), env, clips=True)
  opened = []

  def open_source(data, split):
    opened.append((data.name, data.num_frames, data.image_size, split))
    return films.source("test")

  monkeypatch.setattr(base.sources, "open_source", open_source)
  env.config.clips.update(name="films", num_frames=FRAMES, image_size=8)
  evaluator = fakes.build(
    "retrieval", fakes.Dual(), env, clips=True, split="test"
  )
  assert len(evaluator.records) == 4
  assert opened == [("films", FRAMES, 8, "test")]
  assert evaluator.image(0).shape == (FRAMES, 8, 8, 3)
  other = fakes.build("retrieval", fakes.Dual(), env, split="test")
  assert len(other.records) == 1
