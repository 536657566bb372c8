"""Makes the examples of the data set `scenes`; needs numpy alone.

An example is a pure function of (spec, split, index), the same to the byte
everywhere: see `dice.py` and `scenes_render.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from vlp_jax.data import generation
from vlp_jax.data import scenes_language as language
from vlp_jax.data import scenes_probes as probes
from vlp_jax.data import scenes_render as render
from vlp_jax.data.dice import Dice

SPLITS = ("train", "validation", "test", "comp")
_SEED = 20_260_401
_MARGIN = 0.03  # how far centres keep from the limits of the places

_PAIRS = [(c, s) for c in language.COLORS for s in language.SHAPES]
SEEN_PAIRS = [pair for pair in _PAIRS if pair not in language.HELD_OUT]
_HELD_OUT_PAIRS = sorted(language.HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Spec(generation.Spec):
  """What a configuration of the data set is.

  Attributes:
    counts: numbers of objects in a scene; drawn from evenly.
    radii: those of small and of large objects, in 1/1024 of the picture.
  """

  num_train: int = 20_000
  num_eval: int = 1_000
  counts: tuple[int, ...] = (1, 2, 2, 3, 3)
  radii: tuple[range, range] = (range(96, 121, 8), range(168, 209, 8))


SPECS: Mapping[str, Spec] = {
  "px64": Spec("64 pixels, 1 to 3 objects"),
  "px96": Spec("96 pixels, 1 to 3 objects", image_size=96),
  "px128": Spec("128 pixels, 1 to 3 objects", image_size=128),
  "objects5": Spec(
    "96 pixels, 1 to 5 smaller objects",
    image_size=96,
    counts=(1, 2, 3, 3, 4, 4, 5, 5),
    radii=(range(72, 91, 6), range(126, 157, 6)),
  ),
  "debug": Spec("the first examples of px64", num_train=200, num_eval=64),
}


def example(spec: Spec, split: str, index: int) -> dict[str, Any]:
  """Makes one example.

  Returns:
    `image` (PNG bytes), `image_id` (int, unique across splits), `captions`,
    `objects`, `phrases`, `binding` and `relation`, all as a record has them.
  """
  attempt = _attempts(spec, split)[index] if split != "train" else 0
  dice = _dice(spec, split, index, attempt)
  sprites, objects = _scene(spec, split, dice)
  texts = language.captions(objects, dice)
  picture = render.draw(sprites, spec.image_size, dice)
  return {
    "image": render.encode_png(picture),
    "image_id": SPLITS.index(split) * 10_000_000 + index,
    "captions": texts,
    "objects": objects,
    "phrases": probes.phrases(objects),
    "binding": probes.binding(objects, dice),
    "relation": probes.relation(objects, dice),
  }


def _dice(spec: Spec, split: str, index: int, attempt: int) -> Dice:
  kind = (spec.image_size, max(spec.counts), SPLITS.index(split))
  return Dice(_SEED, *kind, index, attempt)


def _scene(spec: Spec, split: str, dice: Dice):
  """Draws what is in a scene and where, as sprites and as annotations."""
  sprites = _layout(spec, split == "comp", dice)
  return sprites, [_annotation(sprite, spec.image_size) for sprite in sprites]


def _annotation(sprite: render.Sprite, image_size: int) -> dict[str, Any]:
  return {
    "shape": sprite.shape,
    "color": sprite.color,
    "size": sprite.size,
    "bbox": [round(edge / image_size, 6) for edge in sprite.box],
  }


@functools.cache
def _attempts(spec: Spec, split: str) -> tuple[int, ...]:
  """Counts the draws that were refused before each scene of a split.

  A scene is drawn again while an earlier scene of the split would have the same
  full caption, in whatever order: so each is the full caption of one picture.
  """

  def content(index: int, attempt: int) -> tuple[str, ...]:
    _, objects = _scene(spec, split, _dice(spec, split, index, attempt))
    return tuple(sorted(map(str, map(language.describe_fully, objects))))

  return generation.distinct(spec.num_examples(split), content)


def _layout(spec: Spec, compositional: bool, dice: Dice) -> list[render.Sprite]:
  """Draws the objects of a scene and finds room for them."""
  while True:
    pairs = [
      dice.pick(_PAIRS if compositional else SEEN_PAIRS)
      for _ in range(dice.pick(spec.counts))
    ]
    if compositional:
      pairs[0] = dice.pick(_HELD_OUT_PAIRS)
    sprites = []
    for color, shape in dice.shuffled(pairs):
      size = dice.below(2)
      radius = dice.pick(spec.radii[size]) * spec.image_size * 256 // 1024
      angle = render.UPRIGHT[shape] + 5 * (dice.below(9) - 4)
      stencil = render.stencil(shape, radius, angle)
      corner = _place(stencil, sprites, spec.image_size, dice)
      if corner is None:
        break
      sprites.append(
        render.Sprite(shape, color, language.SIZES[size], stencil, *corner)
      )
    else:
      return sprites


def _place(stencil, others, image_size: int, dice: Dice):
  """Finds a corner (x, y) where a stencil is clear of all; None if it fails."""
  height, width = stencil.coverage.shape
  x0, y0, x1, y1 = stencil.box
  columns = _starts(image_size, width, x0 + x1)
  rows = _starts(image_size, height, y0 + y1)
  for _ in range(40):
    x, y = dice.pick(columns), dice.pick(rows)
    if not any(_touch(x, y, width, height, other) for other in others):
      return x, y
  return None


@functools.cache
def _starts(image_size: int, extent: int, box_ends: int) -> tuple[int, ...]:
  """Lists where a stencil may begin, so that its place is beyond dispute.

  Args:
    image_size: pixels.
    extent: of the stencil, pixels.
    box_ends: first plus last pixel of its box, twice the box's centre.
  """
  return tuple(
    start
    for start in range(1, image_size - extent)
    if all(
      abs((2 * start + box_ends) / (2 * image_size) - limit) > _MARGIN
      for limit in language.LIMITS
    )
  )


def _touch(x: int, y: int, width: int, height: int, other) -> bool:
  """Says whether less than a pixel is between a place and a sprite."""
  other_height, other_width = other.stencil.coverage.shape
  return (
    other.x - width <= x <= other.x + other_width
    and other.y - height <= y <= other.y + other_height
  )
