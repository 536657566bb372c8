"""The language of the data set `scenes_video`: captions that need time.

It is the language of `scenes` (`scenes_language.py`: terms, counts, "only",
"a" is "at least one", two terms need two objects) with a motion said of a term:

  caption = ["only"] term {("and" | "with") term}
  term    = ("a" | number) [size] [color] noun [motion]
  motion  = "moves left", "grows", ...; "move left", "grow" after two and more

There are no places, no relations, and no "there is". A term with a motion fits
an object that does this in the clip; a term without says nothing of motion.
Whoever grows or shrinks has no size.

Played backwards, an object does the reverse: who moves left moves right, who
appears vanishes; who stays or turns over does the same. `reversals` lists what
else may be going on in a clip of which one frame, the middle one, is known.

An object here is a dict with `shape`, `color`, `size` (None of those whose size
changes) and `motion`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence

from vlp_jax.data import scenes_language as scenes
from vlp_jax.data.dice import Dice
from vlp_jax.data.scenes_language import Meaning, Object

# Motions, as said of one object and of more.
PLURALS = {
  "moves left": "move left",
  "moves right": "move right",
  "moves up": "move up",
  "moves down": "move down",
  "grows": "grow",
  "shrinks": "shrink",
  "appears": "appear",
  "vanishes": "vanish",
  "turns over": "turn over",
  "stays": "stay",
}
_OPPOSITES = (
  ("moves left", "moves right"),
  ("moves up", "moves down"),
  ("grows", "shrinks"),
  ("appears", "vanishes"),
)
ATTRIBUTES = {**scenes.ATTRIBUTES, "motion": tuple(PLURALS)}
# What each motion is, played backwards; not those that stay the same.
REVERSE = dict(_OPPOSITES) | {b: a for a, b in _OPPOSITES}


@dataclasses.dataclass(frozen=True)
class Act(scenes.Term):
  """A term of `scenes` and what its object does; None is "not said"."""

  motion: str | None = None

  def __str__(self) -> str:
    many = self.count is not None and self.count > 1
    verb = PLURALS[self.motion] if many and self.motion else self.motion
    return f"{super().__str__()} {verb}" if verb else super().__str__()

  def fits(self, thing: Object) -> bool:
    """Says whether the description, but for the count, is true of an object."""
    return super().fits(thing) and self.motion in (None, thing["motion"])


def describe(thing: Object, *, size=False, motion=True) -> Act:
  """Makes the term for an object's colour and shape, and more on request."""
  return Act(
    color=thing["color"],
    shape=thing["shape"],
    size=thing["size"] if size else None,
    motion=thing["motion"] if motion else None,
  )


# ------------------------------------------------------ saying and parsing

_SINGULAR = {singular: singular for singular in PLURALS}
_PLURAL = {plural: singular for singular, plural in PLURALS.items()}
_VERB = re.compile(rf" ({'|'.join([*_SINGULAR, *_PLURAL])})(?= |$)")


def _act_at(text: str, at: int) -> tuple[Act, int] | None:
  found = scenes.term_at(text, at)
  if found is None or found[0].place:
    return None
  term, at = found
  act, verb = Act(**dataclasses.asdict(term)), _VERB.match(text, at)
  if verb is None:
    return act, at
  verbs = _PLURAL if (term.count or 1) > 1 else _SINGULAR
  if verb[1] not in verbs:
    return None
  return dataclasses.replace(act, motion=verbs[verb[1]]), verb.end()


def parse(text: str) -> Meaning | None:
  """Returns what a caption means, or None if it is not in the grammar.

  The meaning's terms are `Act`s; `scenes_language.say` says it again.
  """
  meaning = scenes.parse(text, _act_at)
  if meaning is None or text.split()[0] == "there":
    return None
  return meaning if set(meaning.links) <= {"and"} else None


def is_true(meaning: Meaning, objects: Sequence[Object]) -> bool:
  """Says whether a meaning is true of a clip with these objects."""
  return scenes.is_true(meaning, objects)


# --------------------------------------------------------------- reversals


def reverse(thing: Object) -> Object:
  """Returns an object whose motion is played backwards."""
  motion = thing["motion"]
  return {**thing, "motion": REVERSE.get(motion, motion)}


def reversals(objects: Sequence[Object]) -> list[list[Object]]:
  """Lists what may be going on where the middle frame of a clip is known.

  Returns:
    The objects, with any of their motions reversed: 2^n lists, the true one
    first, if n of them have a reverse. All have the same middle frame, and are
    equally likely: see `motion_generate.py`.
  """
  ways = [
    [thing, reverse(thing)] if thing["motion"] in REVERSE else [thing]
    for thing in objects
  ]
  return [list(way) for way in itertools.product(*ways)]


def rivals(meaning: Meaning) -> list[Meaning]:
  """Lists a meaning and those in which only motions differ, reversed."""
  ways = [
    [term, dataclasses.replace(term, motion=REVERSE[term.motion])]
    if term.motion in REVERSE
    else [term]
    for term in meaning.terms
  ]
  return [
    dataclasses.replace(meaning, terms=terms)
    for terms in itertools.product(*ways)
  ]


# ---------------------------------------------------------------- captions


def captions(objects: Sequence[Object], dice: Dice) -> list[str]:
  """Makes five different true captions of a clip.

  Returns:
    [0] every object with its size and motion; [1] what one object does; [2]
    what one or two do, said by their colours or shapes alone; [3] a count, or
    "only"; [4] a part, and no motion.
  """
  everything = [describe(thing, size=True) for thing in dice.shuffled(objects)]
  makers = (_motion, _partly, _count, _part)
  return scenes.distinct(_say(everything), makers, objects, dice)


def _say(terms: Iterable[Act], only: bool = False) -> str:
  terms = tuple(terms)
  return scenes.say(Meaning(terms, ("and",) * (len(terms) - 1), only))


def _motion(objects, dice) -> str:
  thing = dice.pick(objects)
  if len(objects) == 1 and thing["size"] is None:  # else it is the full caption
    return _say([_vaguely(thing, dice)])
  return _say([describe(thing, size=len(objects) > 1 and dice.chance(1, 3))])


def _partly(objects, dice) -> str:
  return _say(_vaguely(thing, dice) for thing in dice.shuffled(objects)[:2])


def _vaguely(thing: Object, dice: Dice) -> Act:
  unsaid = dice.pick(("color", "shape"))
  return dataclasses.replace(describe(thing), **{unsaid: None})


def _count(objects, dice) -> str:
  make = functools.partial(describe, motion=dice.chance(1, 2))
  choices = [[make(thing) for thing in dice.shuffled(objects)]]
  for key in ("color", "shape", "motion"):
    values = [thing[key] for thing in objects]
    for value in sorted({*values}):
      choices.append([Act(**{key: value}, count=values.count(value))])
  terms = dice.pick(choices)
  return _say(terms, only=terms[0].count is None)


def _part(objects, dice) -> str:
  chosen = dice.shuffled(objects)[: max(1, len(objects) - 1)]
  return _say(describe(thing, motion=False) for thing in chosen)
