"""The language of `scenes`: what is true, what probes ask, what bags know."""

import numpy as np
import pytest

from vlp_jax.data import generation
from vlp_jax.data import scenes_generate as generate
from vlp_jax.data import scenes_language as language
from vlp_jax.data import scenes_probes as probes


@pytest.fixture(scope="module")
def debug():
  """Makes the examples of scenes/debug, by split."""
  return {
    split: list(generation.examples(generate.__name__, "debug", split))
    for split in generate.SPLITS
  }


def _thing(text, x=0.2, y=0.2):
  size, color, shape = text.split()
  bbox = [x - 0.08, y - 0.08, x + 0.08, y + 0.08]
  return {"size": size, "color": color, "shape": shape, "bbox": bbox}


_SCENE = [
  _thing("small red circle", 0.2, 0.2),
  _thing("large red circle", 0.8, 0.22),
  _thing("small blue square", 0.5, 0.8),
]


@pytest.mark.parametrize(
  ("text", "truth"),
  [
    ("a red circle", True),
    ("a green circle", False),
    ("a red circle and a circle", True),
    ("a red circle and a circle and a circle", False),
    ("two red circles", True),
    ("one red circle", False),
    ("there is one small object with a place", None),
    ("there are two small objects", True),
    ("two small objects and a large red circle", True),
    ("three objects with a blue square", True),
    ("two objects with a blue square", False),
    ("only a red circle and a blue square", False),
    ("only a red circle and a circle and a blue object", True),
    ("a red circle at the top left", True),
    ("a large red circle at the top left", False),
    ("a red circle at the top", True),
    ("a blue square at the bottom", True),
    ("a blue square on the left", False),
    ("two circles at the top", True),
    ("two circles on the left", False),
    ("a blue square below a red circle", True),
    ("a blue square above a red circle", False),
    ("a red circle left of a red circle", True),
    ("a large red circle left of a small red circle", False),
    ("a small red circle below a large red circle", False),
    ("a large red circle below a small red circle", False),  # by 0.02 only
    ("a small circle left of a square left of a circle", True),
    ("a small circle left of a square right of a large circle", False),
    ("  a  red   circle ", True),
    # Outside the grammar.
    ("", None),
    ("a red", None),
    ("red circle", None),
    ("a circle red", None),
    ("a red circles", None),
    ("two red circle", None),
    ("a object", None),
    ("a red circle and", None),
    ("a red circle a blue square", None),
    ("a red circle left of two squares", None),
    ("only two circles", None),
    ("there are a circle", None),
    ("there is two circles", None),
    ("a red circle at the top left of a blue square", None),
    ("A red circle", None),
    ("a red circle.", None),
  ],
)
def test_truth(text, truth):
  meaning = language.parse(text)
  if truth is None:
    assert meaning is None
  else:
    assert language.is_true(meaning, _SCENE) is truth


def test_saying_and_parsing_are_inverse(debug):
  for record in debug["train"] + debug["comp"]:
    for caption in record["captions"]:
      meaning = language.parse(caption)
      opener = caption.startswith("there")
      assert language.say(meaning, opener=opener) == caption
      assert language.parse(language.say(meaning, opener=not opener)) == meaning


def test_full_captions_name_all_objects_and_one_picture():
  spec = generate.SPECS["px64"]
  captions = []
  for index in range(spec.num_eval):
    example = generate.example(spec, "comp", index)
    full = example["captions"][0]
    meaning = language.parse(full)
    assert len(meaning.terms) == len(example["objects"])
    assert all(None not in (t.size, t.place) for t in meaning.terms)
    captions.append(tuple(sorted(full.split(" and "))))
  assert len(set(captions)) == spec.num_eval


def test_held_out_pairs_are_in_comp_alone(debug):
  for split, records in debug.items():
    for record in records:
      held = {(o["color"], o["shape"]) for o in record["objects"]}
      assert bool(held & language.HELD_OUT) == (split == "comp")
      for probe in record["binding"]:
        for text, may in (
          (probe["true"], split == "comp"),
          (probe["false"], False),
        ):
          terms = language.parse(text).terms
          pairs = {(t.color, t.shape) for t in terms}
          assert bool(pairs & language.HELD_OUT) == may


# -------------------------------------------------------------------- bags


def test_bags():
  bag = probes.bag_of_attributes("two red circles and a blue object")
  names = np.array([*language.COLORS, *language.SHAPES])
  assert names[bag].tolist() == ["red", "blue", "circle"]
  picture = probes.bag_of_attributes(_SCENE)
  assert names[picture].tolist() == ["red", "blue", "circle", "square"]
  green = probes.bag_of_attributes("a green circle")
  scores = probes.bag_scores(np.stack([bag, picture, green]), picture[None])
  assert scores[:, 0].tolist() == [-1, 0, -103]
  with pytest.raises(ValueError, match="nonsense"):
    probes.bag_of_attributes("nonsense")


def test_bags_are_at_chance_on_the_probes(debug):
  for split in ("test", "comp"):
    result = probes.bag_baseline(debug[split])
    assert result["binding"] == result["relation"] == 0.5
    assert 0.2 < result["t2i_r1"] < 1 and 0.2 < result["i2t_r1"] < 1


def test_bag_baseline_by_hand():
  def record(*things):
    objects = [_thing(thing) for thing in things]
    captions = [" and ".join(f"a {thing}" for thing in things)]
    return {
      "objects": objects,
      "captions": captions,
      "binding": [],
      "relation": [],
    }

  records = [
    record("small red circle", "small blue square"),
    record("small blue circle", "small red square"),  # the same bag
    record("small cyan star"),
  ]
  result = probes.bag_baseline(records)
  assert result == {
    "i2t_r1": pytest.approx(2 / 3),
    "t2i_r1": pytest.approx(2 / 3),
  }
