"""Zero-shot classification and the pointing game."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base, pointing


def thing(color="red", shape="circle", bbox=(0, 0, 0.5, 0.5)):
  return {"color": color, "shape": shape, "size": "small", "bbox": list(bbox)}


# ------------------------------------------------------------- zero-shot


def brute_force_top1(image, prompts, labels):
  """`prompts` [C, T, E]; ties broken at random."""
  classes = prompts.mean(axis=1)
  classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
  scores = image @ classes.T
  best = scores > scores.max(axis=1, keepdims=True) - 1e-6
  rows = np.arange(len(labels))
  return np.mean(best[rows, labels] / best.sum(axis=1))


@pytest.mark.parametrize("batch_size", [2, 7])
def test_zeroshot_equals_brute_force(batch_size):
  rng = np.random.default_rng(0)
  names = ("ant", "bee", "cat")
  labels = rng.integers(0, 3, 20)
  prompts = fakes.unit(rng.normal(size=(3, 2, 4)))
  image = fakes.unit(rng.normal(size=(20, 4)) + prompts[labels, 0])
  tokenizer = fakes.Tokenizer(
    [t.format(n) for n in names for t in ("a {}", "the {}")]
  )
  captions = [["x"]] * 20
  params = {
    "image": image,
    "text": np.vstack([np.zeros((1, 4)), prompts.reshape(6, 4)]).astype("f"),
  }
  expected = brute_force_top1(image, prompts, labels)
  assert 0.33 < expected < 1
  for given, classes in (
    ([int(label) for label in labels], names),
    ([names[label] for label in labels], ()),
    ([names[label].encode() for label in labels], ()),
  ):
    for field in ("label", "category"):
      env = fakes.environment(
        fakes.records(captions, **{field: given}), tokenizer
      )
      got = fakes.build(
        "zeroshot",
        fakes.Dual(),
        env,
        templates=("a {}", "the {}"),
        classes=classes,
        batch_size=batch_size,
      ).run(params)
      assert got["top1"] == pytest.approx(expected)
      assert got["top1_chance"] == pytest.approx(1 / 3)


def test_zeroshot_on_scenes_uses_lone_objects():
  objects = [
    [thing("red", "circle")],
    [thing("blue", "star"), thing("red", "ring")],
    [thing("blue", "ring")],
  ]
  env = fakes.environment(fakes.records([["x"]] * 3, objects=objects))
  evaluator = fakes.build("zeroshot", fakes.Dual(), env)
  assert evaluator.templates == ("a {}",)
  assert evaluator.classes == [
    f"{c} {s}" for c in ("blue", "red") for s in ("circle", "ring", "star")
  ]
  ones = np.ones((7, 2), np.float32)
  got = evaluator.run({"image": ones, "text": ones})
  assert got["top1"] == pytest.approx(got["top1_chance"]) == 1 / 6


def test_zeroshot_says_what_is_wrong():
  def build(records, **fields):
    return fakes.build(
      "zeroshot", fakes.Dual(), fakes.environment(records), **fields
    )

  with pytest.raises(base.NotApplicableError, match="'label' or 'category'"):
    build(fakes.records([["x"]]))
  with pytest.raises(base.NotApplicableError, match="name the classes"):
    build(fakes.records([["x"]], label=[3]))
  with pytest.raises(UserError, match="'dog'"):
    build(fakes.records([["x"]], label=["dog"]), classes=("cat",))
  with pytest.raises(UserError, match="templates"):
    build(fakes.records([["x"]], label=["dog"]), templates=("a dog",))


# -------------------------------------------------------------- pointing


def test_patches_inside_equals_loop():
  rng = np.random.default_rng(0)
  low = rng.uniform(0, 0.7, (30, 2))
  boxes = np.hstack([low, low + rng.uniform(0.05, 0.3, (30, 2))])
  got = pointing.patches_inside(boxes, 5, 7)
  for n, (x0, y0, x1, y1) in enumerate(boxes):
    for i in range(5):
      for j in range(7):
        x, y = (j + 0.5) / 7, (i + 0.5) / 5
        assert got[n, i, j] == (x0 <= x <= x1 and y0 <= y <= y1)


def test_hits():
  boxes = np.array([[0, 0, 0.5, 0.5]] * 4)  # the top left quarter
  maps = np.zeros((4, 4, 4), np.float32)
  maps[0, 1, 1] = 1  # inside
  maps[1, 1, 2] = 1  # to the right of it
  maps[2] = 3.0  # no opinion
  maps[3, 0, 0] = maps[3, 3, 3] = 1  # one of two
  np.testing.assert_allclose(pointing.hits(maps, boxes), [1, 0, 0.25, 0.5])
  assert pointing.hits(np.full((1, 4, 4), np.nan), boxes[:1])[0] == 0.25


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_pointing(batch_size):
  left, right, all_ = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
  objects = [
    [thing(bbox=left), thing(bbox=right)],
    [thing(bbox=all_)],  # does not count
    [thing(bbox=left), thing(bbox=right), thing(bbox=right)],
  ]
  phrases = [
    [{"text": "l", "bbox": list(left)}, {"text": "r", "bbox": list(right)}],
    [{"text": "l", "bbox": list(all_)}],
    [{"text": "l", "bbox": list(left)}],
  ]
  env = fakes.environment(
    fakes.records([["x"]] * 3, objects=objects, phrases=phrases),
    fakes.Tokenizer(["l", "r"]),
  )
  maps = np.zeros((3, 3, 2, 4), np.float32)
  maps[0, 1, 0, 1] = 1  # left: a hit
  maps[0, 2, 1, 0] = 1  # left, where right is asked: a miss
  maps[2, 1, 1, 1] = 1  # a hit
  params = {"cosine": maps, "contribution": np.zeros_like(maps)}
  evaluator = fakes.build(
    "pointing",
    fakes.Captioner(),
    env,
    readout="cosine",
    batch_size=batch_size,
  )
  got = evaluator.run(params)
  assert got == pytest.approx(
    {
      "accuracy": 2 / 3,
      "accuracy_contribution": 0.5,
      "accuracy_chance": 0.5,
      "accuracy_random_object": (1 / 2 + 1 / 2 + 1 / 3) / 3,
    }
  )
  default = fakes.build("pointing", fakes.Captioner(), env)
  assert default.readout == "contribution"
  with pytest.raises(UserError, match="contribution, cosine"):
    fakes.build("pointing", fakes.Captioner(), env, readout="gaze")


# ----------------------------------------------------------------- build


def test_build_says_what_is_wrong():
  env = fakes.environment(fakes.records([["x"]]))
  with pytest.raises(
    UserError, match="binding, captioning, grounding, keywords"
  ):
    fakes.build("vqa", fakes.Dual(), env)
  with pytest.raises(UserError, match="did you mean 'captions'"):
    fakes.build("retrieval", fakes.Dual(), env, caption="all")
  with pytest.raises(UserError, match="lacks generate"):
    fakes.build("captioning", fakes.Dual(), env)
  with pytest.raises(base.NotApplicableError, match="annotated objects"):
    fakes.build("binding", fakes.Captioner(), env)


def test_build_all_leaves_out_what_the_data_cannot_serve(caplog):
  env = fakes.environment(fakes.records([["x"]]))
  for name in ("retrieval", "pointing", "zeroshot"):
    env.config.evals[name] = {"type": name}
  assert list(base.build_all(fakes.Captioner(), env)) == ["retrieval"]
  env.config.evals.captioning = {"type": "captioning"}
  with pytest.raises(UserError, match="lacks generate"):
    base.build_all(fakes.Dual(), env)


def test_env_opens_each_split_once_and_by_its_name(monkeypatch):
  opened = []
  monkeypatch.setattr(
    base.sources, "open_source", lambda data, split: opened.append(split) or []
  )
  env = fakes.environment(fakes.records([["x"]]))
  env._sources.clear()
  env.config.data.val_split = "val"
  for split in ("validation", "val", "comp", "comp", "test"):
    env.source(split)
  assert opened == ["val", "comp", "test"]


def test_max_examples():
  env = fakes.environment(fakes.records([[f"t{i}"] for i in range(5)]))
  evaluator = fakes.build("retrieval", fakes.Dual(), env, max_examples=3)
  ones = np.ones((9, 2), np.float32)
  got = evaluator.run({"image": ones, "text": ones})
  assert got["t2i_r1"] == got["t2i_r1_chance"] == pytest.approx(1 / 3)


def test_a_category_that_is_a_path_counts_by_its_first_part():
  from vlp_jax.evaluators import zeroshot

  assert zeroshot._label({"category": ["animals", "cats"]}) == "animals"
  assert zeroshot._label({"category": []}) is None
