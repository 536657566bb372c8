"""What clips of `scenes_video` are probed with: motions, and whose they are.

`one_frame.py` says what is reached without looking at a second frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vlp_jax.data import motion_language as language
from vlp_jax.data.dice import Dice
from vlp_jax.data.scenes_language import Meaning, Object, say


def _say(objects: Sequence[Object]) -> str:
  terms = tuple(map(language.describe, objects))
  return say(Meaning(terms, ("and",) * (len(terms) - 1)))


def motion(objects: Sequence[Object], chosen: int) -> list[dict[str, str]]:
  """Makes "a red circle moves left and a blue star grows" against "a red circle
  moves right and a blue star grows", which is false of the clip.

  Args:
    objects: all of which the texts name.
    chosen: whose motion is reversed in the false one.

  Returns:
    one dict with `true` and `false`.
  """
  false = list(objects)
  false[chosen] = language.reverse(false[chosen])
  return [{"true": _say(objects), "false": _say(false)}]


def binding(objects: Sequence[Object], dice: Dice) -> list[dict[str, str]]:
  """Makes "a red circle moves left and a blue star grows" against "a red circle
  grows and a blue star moves left", which is false and has the same words.

  Returns:
    one dict with `true` and `false`, or none where there is no such pair.
  """
  for a, b in dice.shuffled([*itertools.permutations(objects, 2)]):
    swapped = {**a, "motion": b["motion"]}, {**b, "motion": a["motion"]}
    false = _say(swapped)
    if not language.is_true(language.parse(false), objects):
      return [{"true": _say([a, b]), "false": false}]
  return []
