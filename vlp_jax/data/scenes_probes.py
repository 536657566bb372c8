"""What the scenes are probed with: phrases, binding, relations, and bags.

A *bag* is all that a model knows which tells the colours and the shapes in a
picture, but not which colour is on which shape. It is the baseline to beat:
what is above it says that attributes are bound to objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from vlp_jax.data import scenes_language
from vlp_jax.data.dice import Dice
from vlp_jax.data.scenes_language import (
  HELD_OUT,
  Meaning,
  Object,
  describe,
  is_true,
  places,
  relation_between,
  say,
)


def phrases(objects: Sequence[Object]) -> list[dict[str, Any]]:
  """Refers to each object by the shortest phrase that fits no other object.

  Returns:
    dicts with `text` ("a red circle", with size or place where needed) and the
    object's `bbox`; none for an object that no phrase tells from the others.
  """
  found = []
  for thing in objects:
    for more in ((), ("size",), ("place",), ("size", "place")):
      place = places(thing)[0] if "place" in more else None
      term = describe(thing, size="size" in more, place=place)
      if sum(map(term.fits, objects)) == 1:
        found.append({"text": str(term), "bbox": thing["bbox"]})
        break
  return found


def _pair(a: Object, link: str, b: Object) -> Meaning:
  return Meaning((describe(a), describe(b)), (link,))


def _is_held_out(thing: Object) -> bool:
  return (thing["color"], thing["shape"]) in HELD_OUT


def binding(objects: Sequence[Object], dice: Dice) -> list[dict[str, str]]:
  """Makes "a red circle and a blue square" against "a blue circle and a red
  square", which is false of the scene; a bag cannot tell them apart.

  The false text never has a held-out pair: it could be told by being unusual.
  In a scene with held-out pairs, the true text has one; there the prior of a
  language model is against the right answer.

  Returns:
    one dict with `true` and `false`, or none where there is no such pair.
  """
  compositional = any(map(_is_held_out, objects))
  for a, b in dice.shuffled([*itertools.permutations(objects, 2)]):
    if compositional and not (_is_held_out(a) or _is_held_out(b)):
      continue
    swapped = {**a, "color": b["color"]}, {**b, "color": a["color"]}
    false = _pair(swapped[0], "and", swapped[1])
    if not any(map(_is_held_out, swapped)) and not is_true(false, objects):
      return [{"true": say(_pair(a, "and", b)), "false": say(false)}]
  return []


def relation(objects: Sequence[Object], dice: Dice) -> list[dict[str, str]]:
  """Makes "a red circle left of a blue square" against "a blue square left of
  a red circle", which is false of the scene and has the same words.

  Returns:
    one dict with `true` and `false`, or none where there is no such pair.
  """
  for a, b in dice.shuffled([*itertools.permutations(objects, 2)]):
    link = relation_between(a, b)
    false = _pair(b, link, a)
    if not is_true(false, objects):
      return [{"true": say(_pair(a, link, b)), "false": say(false)}]
  return []


# -------------------------------------------------------------------- bags


def bag_of_attributes(
  what: str | Sequence[Object], language: ModuleType = scenes_language
) -> np.ndarray:
  """Reduces a caption, or the objects of a scene, to its colours and shapes.

  Args:
    what: a caption, or objects.
    language: of the caption; its `ATTRIBUTES` say what there is to know. In
      `motion_language` that is motions as well.

  Returns:
    bool `[A]`: which of all values of the attributes there are, in the order
    of `ATTRIBUTES`.

  Raises:
    ValueError: if a caption is not in the grammar.
  """
  keys, values = zip(*language.ATTRIBUTES.items(), strict=True)
  if isinstance(what, str):
    meaning = language.parse(what)
    if meaning is None:
      name = language.__name__.rpartition(".")[2]
      raise ValueError(f"not a caption of {name}: {what!r}")
    words = {getattr(term, key) for term in meaning.terms for key in keys}
  else:
    words = {thing[key] for thing in what for key in keys}
  return np.array([w in words for w in itertools.chain.from_iterable(values)])


def bag_scores(texts: np.ndarray, pictures: np.ndarray) -> np.ndarray:
  """Scores how well bags of captions fit bags of pictures.

  What a caption says and the picture lacks counts first, and what the caption
  leaves unsaid breaks ties.

  Args:
    texts: bool `[T, A]`, from `bag_of_attributes`.
    pictures: bool `[P, A]`.

  Returns:
    int `[T, P]`; 0 is the best, equal bags.
  """
  texts, pictures = texts.astype(int), pictures.astype(int)
  lacking = texts @ (1 - pictures).T
  unsaid = (1 - texts) @ pictures.T
  return -(100 * lacking + unsaid)


def bag_baseline(records: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Scores a model that knows bags and nothing else; ties are drawn by lot.

  Returns:
    `i2t_r1`, `t2i_r1` (expected recall at 1 with the first caption of each
    record), `binding` and `relation` (accuracy; absent without such probes).
  """
  pictures = np.stack([bag_of_attributes(r["objects"]) for r in records])
  texts = np.stack([bag_of_attributes(r["captions"][0]) for r in records])
  scores = bag_scores(texts, pictures)
  results = {
    "i2t_r1": _expected_recall(scores.T),
    "t2i_r1": _expected_recall(scores),
  }
  for name in ("binding", "relation"):
    right = [
      _chance_of_first(
        bag_scores(
          np.stack(
            [bag_of_attributes(p["true"]), bag_of_attributes(p["false"])]
          ),
          picture[None],
        )[:, 0]
      )
      for record, picture in zip(records, pictures, strict=True)
      for p in record[name]
    ]
    if right:
      results[name] = float(np.mean(right))
  return results


def _expected_recall(scores: np.ndarray) -> float:
  """Averages the chance that the diagonal is drawn from each row's best."""
  best = scores == scores.max(axis=1, keepdims=True)
  return float(np.mean(best.diagonal() / best.sum(axis=1)))


def _chance_of_first(scores: np.ndarray) -> float:
  best = scores == scores.max()
  return float(best[0] / best.sum())
