"""The language of the data set `scenes`: captions, their meaning and truth.

Captions are made as meanings and then said, so that `parse(say(m)) == m`:

  caption  = ["there is" | "there are"] ["only"] term {link term}
  term     = ("a" | number) [size] [color] noun [place]
  link     = "and" | "with" | "left of" | "right of" | "above" | "below"
  noun     = a shape, or "object"; plural after two and more

A meaning is true of a scene if and only if
  * every counted term ("two red circles", "one ring") describes exactly that
    many of the objects;
  * the "a" terms can be given different objects, one each, that fit their
    descriptions and hold the relations between neighbouring terms;
  * where it says "only", the scene has no more objects than terms.
So "a" means "at least one", and "a red circle and a circle" needs two circles.

Positions are those of the centres of the boxes. An object is in the left
column if its x is below 0.36, in the right one if above 0.64, likewise for
rows. "on the left" is said of the whole left column and "at the top left" of
one cell, so both are true of an object in that corner; "in the middle" is the
middle cell. a is left of b if its x is less by more than 0.08. Scenes keep
their objects away from these limits, and captions state the relation on the
axis where two objects are farther apart.

An object here is a dict with `shape`, `color`, `size` and `bbox` ([x0, y0, x1,
y1] as fractions of the picture). Nothing here depends on how scenes are drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlp_jax.data.dice import Dice

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "yellow", "green", "blue", "purple", "cyan")
SIZES = ("small", "large")
# What a bag of attributes knows of a text, or of objects: fields and values.
ATTRIBUTES = {"color": COLORS, "shape": SHAPES}
# The pairs that only the compositional split shows.
HELD_OUT = frozenset((COLORS[i], SHAPES[(i + 2) % 6]) for i in range(6))

LIMITS = (0.36, 0.64)  # between the columns, and between the rows
APART = 0.08

# Column and row (0, 1, 2, or None for any), the most exact first.
_PLACES = {
  "at the top left": (0, 0),
  "at the top right": (2, 0),
  "at the bottom left": (0, 2),
  "at the bottom right": (2, 2),
  "in the middle": (1, 1),
  "at the top": (None, 0),
  "at the bottom": (None, 2),
  "on the left": (0, None),
  "on the right": (2, None),
}
# What the vector (to the right, downwards) from a to b is multiplied with.
_RELATIONS = {
  "left of": (1, 0),
  "right of": (-1, 0),
  "above": (0, 1),
  "below": (0, -1),
}
_NUMBERS = ("one", "two", "three", "four", "five")

Object = Mapping[str, Any]


def _plural(noun: str) -> str:
  return noun + ("es" if noun.endswith("s") else "s")


@dataclasses.dataclass(frozen=True)
class Term:
  """A description; None is "not said". Without a count it means "a ..."."""

  color: str | None = None
  shape: str | None = None
  size: str | None = None
  place: str | None = None
  count: int | None = None

  def __str__(self) -> str:
    noun = self.shape or "object"
    many = self.count is not None and self.count > 1
    words = (
      "a" if self.count is None else _NUMBERS[self.count - 1],
      self.size,
      self.color,
      _plural(noun) if many else noun,
      self.place,
    )
    return " ".join(word for word in words if word)

  def fits(self, thing: Object) -> bool:
    """Says whether the description, but for the count, is true of an object."""
    return (
      self.color in (None, thing["color"])
      and self.shape in (None, thing["shape"])
      and self.size in (None, thing["size"])
      and (self.place is None or self.place in places(thing))
    )


@dataclasses.dataclass(frozen=True)
class Meaning:
  """What a caption says: see the head of this file.

  Attributes:
    terms: the descriptions.
    links: "and" or a relation, between each term and the next.
    only: whether there is nothing else.
  """

  terms: tuple[Term, ...]
  links: tuple[str, ...] = ()
  only: bool = False


# Reads a term of a text at a place: the term and where it ends, or None.
ReadTerm = Callable[[str, int], tuple[Term, int] | None]


def center(thing: Object) -> tuple[float, float]:
  """Returns the centre (x, y) of an object's box."""
  x0, y0, x1, y1 = thing["bbox"]
  return (x0 + x1) / 2, (y0 + y1) / 2


def places(thing: Object) -> list[str]:
  """Lists the places that are true of an object, the most exact first."""
  column, row = ((at > LIMITS[0]) + (at > LIMITS[1]) for at in center(thing))
  return [
    place
    for place, cell in _PLACES.items()
    if cell[0] in (None, column) and cell[1] in (None, row)
  ]


def _holds(relation: str, a: Object, b: Object) -> bool:
  (ax, ay), (bx, by) = center(a), center(b)
  right, down = _RELATIONS[relation]
  return right * (bx - ax) + down * (by - ay) > APART


def describe(thing: Object, *, size=False, place: str | None = None) -> Term:
  """Makes the term for an object's colour and shape, and more on request."""
  return Term(
    thing["color"], thing["shape"], thing["size"] if size else None, place
  )


def describe_fully(thing: Object) -> Term:
  """Makes the term that says all of an object, its place as one cell."""
  return describe(thing, size=True, place=places(thing)[0])


# ------------------------------------------------------ saying and parsing


def say(meaning: Meaning, opener: bool = False) -> str:
  """Turns a meaning into its caption; `opener` puts "there is" before it."""
  first = meaning.terms[0]
  words = ["only"] if meaning.only else []
  if opener:
    words.insert(0, "there are" if (first.count or 1) > 1 else "there is")
  words.append(str(first))
  for link, term in zip(meaning.links, meaning.terms[1:], strict=True):
    # "three objects with a ring" is how one says it.
    with_ = link == "and" and first == Term(count=first.count)
    words += ["with" if with_ else link, str(term)]
  return " ".join(words)


def _choice(words: Iterable[str]) -> str:
  return "|".join(sorted(words, key=len, reverse=True))


_SINGULAR = {noun: noun for noun in (*SHAPES, "object")}
_PLURAL = {_plural(noun): noun for noun in _SINGULAR}
_TERM = re.compile(
  rf"(?P<count>a|{_choice(_NUMBERS)}) "
  rf"(?:(?P<size>{_choice(SIZES)}) )?"
  rf"(?:(?P<color>{_choice(COLORS)}) )?"
  rf"(?P<noun>{_choice([*_SINGULAR, *_PLURAL])})"
  rf"(?: (?P<place>{_choice(_PLACES)}))?(?= |$)"
)
_OPENER = re.compile(r"(?:there (?P<be>is|are) )?(?P<only>only )?")
_LINK = re.compile(rf" (?P<link>and|with|{_choice(_RELATIONS)}) ")


def term_at(text: str, at: int) -> tuple[Term, int] | None:
  """Reads a term; returns it and where it ends, or None if there is none."""
  match = _TERM.match(text, at)
  term = _read_term(match) if match else None
  return None if term is None else (term, match.end())


def parse(text: str, read: ReadTerm = term_at) -> Meaning | None:
  """Returns what a caption means, or None if it is not in the grammar.

  Spaces may be repeated; all else must be exact, agreement in number included.
  Relations join "a" terms, and "only" stands with "a" terms alone.

  Args:
    text: the caption.
    read: reads a term, as `term_at`; another language may say more in it.
  """
  text = " ".join(text.split())
  opener = _OPENER.match(text)
  at, terms, links = opener.end(), [], []
  while True:
    found = read(text, at)
    if found is None:
      return None
    term, at = found
    terms.append(term)
    if at == len(text):
      break
    link = _LINK.match(text, at)
    if link is None:
      return None
    links.append("and" if link["link"] == "with" else link["link"])
    at = link.end()
  if opener["be"] and (opener["be"] == "are") != ((terms[0].count or 1) > 1):
    return None
  only = opener["only"] is not None
  counted = [term.count is not None for term in terms]
  if only and any(counted):
    return None
  for i, link in enumerate(links):
    if link != "and" and (counted[i] or counted[i + 1]):
      return None
  return Meaning(tuple(terms), tuple(links), only)


def _read_term(match: re.Match[str]) -> Term | None:
  word = match["count"]
  count = None if word == "a" else _NUMBERS.index(word) + 1
  nouns = _PLURAL if count is not None and count > 1 else _SINGULAR
  if match["noun"] not in nouns:
    return None
  noun = nouns[match["noun"]]
  shape = None if noun == "object" else noun
  if count is None and not (match["size"] or match["color"] or shape):
    return None  # "a object"
  return Term(match["color"], shape, match["size"], match["place"], count)


def is_true(meaning: Meaning, objects: Sequence[Object]) -> bool:
  """Says whether a meaning is true of a scene (defined at the file's head)."""
  if meaning.only and len(objects) != len(meaning.terms):
    return False
  for term in meaning.terms:
    counted = term.count is not None
    if counted and sum(map(term.fits, objects)) != term.count:
      return False
  single = [i for i, term in enumerate(meaning.terms) if term.count is None]

  def agrees(given: tuple[Object, ...]) -> bool:
    held_by = dict(zip(single, given, strict=True))
    return all(meaning.terms[i].fits(held_by[i]) for i in single) and all(
      link == "and" or _holds(link, held_by[i], held_by[i + 1])
      for i, link in enumerate(meaning.links)
    )

  return any(map(agrees, itertools.permutations(objects, len(single))))


def vocabulary() -> list[str]:
  """Lists the words that captions can hold, sorted."""
  phrases = (
    *SHAPES,
    *COLORS,
    *SIZES,
    *_PLACES,
    *_RELATIONS,
    *_NUMBERS,
    *_PLURAL,
    "object a and with there is are only",
  )
  return sorted({word for phrase in phrases for word in phrase.split()})


# ---------------------------------------------------------------- captions


def captions(objects: Sequence[Object], dice: Dice) -> list[str]:
  """Makes five different true captions of a scene.

  Returns:
    [0] every object with its size and place; [1] a relation (of a lone object,
    its size); [2] one object's place; [3] a count, or "only"; [4] a part.
  """
  everything = say(_all_of([*map(describe_fully, dice.shuffled(objects))]))
  makers = (_relation, _place, _count, _part)
  return distinct(everything, makers, objects, dice)


def distinct(
  first: str, makers: Iterable[Callable], objects: Sequence, dice: Dice
) -> list[str]:
  """Adds a text of each maker to a first one; makes it anew until it differs.

  Args:
    first: a text.
    makers: each maps objects and dice to a text.
    objects: what the texts are about.
    dice: of all draws.

  Returns:
    Texts that all differ, one more than there are makers.
  """
  texts = [first]
  for make in makers:
    text = make(objects, dice)
    while text in texts:
      text = make(objects, dice)
    texts.append(text)
  return texts


def _all_of(terms: Sequence[Term], only: bool = False) -> Meaning:
  return Meaning(tuple(terms), ("and",) * (len(terms) - 1), only)


def relation_between(a: Object, b: Object) -> str:
  """Returns what a is to b, on the axis where they are farther apart."""
  (ax, ay), (bx, by) = center(a), center(b)
  right, down = bx - ax, by - ay
  if abs(right) >= abs(down):
    return "left of" if right > 0 else "right of"
  return "above" if down > 0 else "below"


def _relation(objects, dice) -> str:
  if len(objects) == 1:
    return say(Meaning((describe(objects[0], size=True),)), opener=True)
  a, b = dice.shuffled(objects)[:2]
  terms = (
    describe(a, size=dice.chance(1, 4)),
    describe(b, size=dice.chance(1, 4)),
  )
  meaning = Meaning(terms, (relation_between(a, b),))
  return say(meaning, opener=dice.chance(1, 4))


def _place(objects, dice) -> str:
  thing = dice.pick(objects)
  place = dice.pick(places(thing))
  term = describe(thing, size=dice.chance(1, 3), place=place)
  return say(Meaning((term,)), opener=dice.chance(1, 4))


def _count(objects, dice) -> str:
  if len(objects) == 1:
    return say(_all_of([describe(objects[0])], only=True))
  choices = [_all_of([Term(count=len(objects)), describe(dice.pick(objects))])]
  if len(objects) == 2:
    terms = [describe(thing) for thing in dice.shuffled(objects)]
    choices.append(_all_of(terms, only=True))
  for key in ("color", "shape"):
    values = [thing[key] for thing in objects]
    for value in sorted({v for v in values if values.count(v) > 1}):
      term = Term(**{key: value}, count=values.count(value))
      choices.append(Meaning((term,)))
  return say(dice.pick(choices), opener=dice.chance(1, 4))


def _part(objects, dice) -> str:
  chosen = dice.shuffled(objects)[: max(1, len(objects) - 1)]
  terms = [describe(thing) for thing in chosen]
  if dice.chance(1, 4):
    unsaid = dice.pick(("color", "shape"))
    terms[0] = dataclasses.replace(terms[0], **{unsaid: None})
  return say(_all_of(terms))
