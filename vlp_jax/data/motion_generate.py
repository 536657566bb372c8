"""Makes the examples of the data set `scenes_video`; needs numpy alone.

A clip has an odd number of frames, so it has a middle one, and this frame does
not tell a motion from its reverse: each object is laid out as it is there, with
room for all that it does, and a coin decides which way time runs for it. So the
clips in which any of the motions are reversed have the same middle frame, to
the byte, and are equally likely.

Clips come in twins, 2 k and 2 k + 1, that differ in one object's motion, which
is reversed in the second. An example is a pure function of (spec, split,
index), the same to the byte everywhere: see `dice.py` and `scenes_render.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vlp_jax.data import generation
from vlp_jax.data import motion_language as language
from vlp_jax.data import motion_probes as probes
from vlp_jax.data import scenes_generate as scenes
from vlp_jax.data import scenes_render as render
from vlp_jax.data.dice import Dice
from vlp_jax.data.scenes_language import SIZES

SPLITS = ("train", "validation", "test")
_SEED = 20_260_402
_FIRST_ID = 100_000_000  # behind those of scenes
_TRIES = 40  # to find room for an object
_THIN = 30  # percent of its height that an object keeps while it turns
_GROWTH = 80  # percent of its radius in the middle by which it changes in all
_STEP = 32  # units of which radii change by multiples: stencils are kept
_STEPS = {  # (to the right, downwards)
  "moves left": (-1, 0),
  "moves right": (1, 0),
  "moves up": (0, -1),
  "moves down": (0, 1),
}

# What an object does, before a coin decides on its reverse.
_MOTIONS = (
  *("moves left", "moves left", "moves up", "moves up"),
  *("grows", "grows", "appears", "turns over", "stays"),
)


@dataclasses.dataclass(frozen=True)
class Spec(generation.Spec):
  """What a configuration of the data set is.

  Attributes:
    frames: numbers of frames, odd; drawn from evenly.
    counts: numbers of objects in a clip; drawn from evenly.
    radii: those of small and of large objects, in 1/1024 of the picture.
    way: how far an object moves in all, likewise.
  """

  num_train: int = 4_000
  num_eval: int = 500
  frames: tuple[int, ...] = (5, 7, 9, 11, 13, 15)
  counts: tuple[int, ...] = (1, 2, 2, 3)
  radii: tuple[range, range] = (range(88, 105, 8), range(136, 161, 8))
  way: range = range(224, 321, 32)


SPECS: Mapping[str, Spec] = {
  "px64": Spec("64 pixels, 5 to 15 frames, 1 to 3 objects"),
  "debug": Spec("the first examples of px64", num_train=200, num_eval=64),
}


@dataclasses.dataclass(frozen=True)
class Actor:
  """An object in the middle frame, and what it does.

  Attributes:
    shape, color, size, motion: as annotated.
    radius: in units.
    angle: in degrees.
    way: units from its first place to its last, if it moves.
    delay: frames before it appears, or after it vanishes, if it does.
    upside_down: whether it is so at first, if it turns over.
    x, y: pixel of its centre.
  """

  shape: str
  color: str
  size: str | None
  motion: str
  radius: int
  angle: int
  way: int
  delay: int
  upside_down: bool
  x: int = 0
  y: int = 0

  def track(self, num_frames: int) -> list[render.Sprite | None]:
    """Returns its sprite in each frame, None where it is not there.

    The track of the reversed motion is the same, from its end.
    """
    half = num_frames // 2
    return [self._sprite(at, half) for at in range(-half, half + 1)]

  def reversed(self) -> Actor:
    """Returns the object with its motion played backwards."""
    motion = language.REVERSE.get(self.motion, self.motion)
    return dataclasses.replace(
      self, motion=motion, upside_down=not self.upside_down
    )

  def _sprite(self, at: int, half: int) -> render.Sprite | None:
    """Returns the sprite at a time from -half to half."""

    def part(units: int, step: int) -> int:
      """Returns in steps which part of a change is done since at = 0.

      Rounded towards 0, or it would not be the same backwards.
      """
      done = units * abs(at) // (2 * half * step)
      return done if at > 0 else -done

    motion, x, y = self.motion, self.x, self.y
    if motion == "appears" and at < self.delay - half:
      return None
    if motion == "vanishes" and at > half - self.delay:
      return None
    radius, height = self.radius, 100
    if motion in _STEPS:
      pixels = part(self.way, render.UNIT)
      x, y = x + _STEPS[motion][0] * pixels, y + _STEPS[motion][1] * pixels
    elif motion in ("grows", "shrinks"):
      change = part(radius * _GROWTH // 100, _STEP) * _STEP
      radius += change if motion == "grows" else -change
    elif motion == "turns over":
      height = max(_THIN, 100 * abs(at) // half)
      height *= -1 if at and (at < 0) == self.upside_down else 1
    stencil = render.stencil(self.shape, radius, self.angle, height)
    dx, dy = stencil.center
    return render.Sprite(
      self.shape, self.color, self.size, stencil, x - dx, y - dy
    )


def example(spec: Spec, split: str, index: int) -> dict[str, Any]:
  """Makes one example.

  Returns:
    `image` (the frames, a list of PNG bytes), `image_id` (int, unique across
    splits, and apart from those of scenes), `captions`, `objects`, `motion`
    and `binding`, all as a record has them.
  """
  clip, twin = divmod(index, 2)
  attempt = _attempts(spec, split)[clip] if split != "train" else 0
  dice = _dice(spec, split, clip, attempt)
  num_frames, actors, chosen = _scene(spec, dice)
  if twin:
    actors[chosen] = actors[chosen].reversed()
  tracks = [actor.track(num_frames) for actor in actors]
  frames = render.draw_clip(tracks, spec.image_size, dice)
  objects = [
    _annotation(actor, track, spec.image_size)
    for actor, track in zip(actors, tracks, strict=True)
  ]
  return {
    "image": [render.encode_png(frame) for frame in frames],
    "image_id": _FIRST_ID + SPLITS.index(split) * 10_000_000 + index,
    "captions": language.captions(objects, dice),
    "objects": objects,
    "motion": probes.motion(objects, chosen),
    "binding": probes.binding(objects, dice),
  }


def _dice(spec: Spec, split: str, clip: int, attempt: int) -> Dice:
  kind = (spec.image_size, max(spec.counts), SPLITS.index(split))
  return Dice(_SEED, *kind, clip, attempt)


def _annotation(
  actor: Actor, track: Sequence[render.Sprite | None], image_size: int
) -> dict[str, Any]:
  boxes = [sprite and _shares(sprite.box, image_size) for sprite in track]
  return {
    "shape": actor.shape,
    "color": actor.color,
    "size": actor.size,
    "motion": actor.motion,
    "bbox": boxes[len(boxes) // 2],
    "boxes": boxes,
  }


def _shares(box: Sequence[int], image_size: int) -> list[float]:
  return [round(edge / image_size, 6) for edge in box]


@functools.cache
def _attempts(spec: Spec, split: str) -> tuple[int, ...]:
  """Counts the draws that were refused before each pair of twins of a split.

  Refused is what shows the same objects with the same motions, reversed or
  not, as an earlier pair: so each full caption is that of one clip.
  """

  def content(clip: int, attempt: int) -> tuple[str, ...]:
    _, actors, _ = _scene(spec, _dice(spec, split, clip, attempt))
    return tuple(
      sorted(
        f"{actor.size} {actor.color} {actor.shape} "
        + min(actor.motion, language.REVERSE.get(actor.motion, actor.motion))
        for actor in actors
      )
    )

  return generation.distinct((spec.num_examples(split) + 1) // 2, content)


def _scene(spec: Spec, dice: Dice) -> tuple[int, list[Actor], int]:
  """Draws a clip: its frames' number, its objects, and which twins reverse."""
  while True:
    num_frames = dice.pick(spec.frames)
    actors, taken = [], []
    for color, shape in (
      dice.pick(scenes.SEEN_PAIRS) for _ in range(dice.pick(spec.counts))
    ):
      actor = _actor(spec, color, shape, num_frames, dice)
      placed = _placed(actor, num_frames, taken, spec.image_size, dice)
      if placed is None:
        break
      actors.append(placed)
    else:
      able = [i for i, a in enumerate(actors) if a.motion in language.REVERSE]
      if able:
        return num_frames, actors, dice.pick(able)


def _actor(
  spec: Spec, color: str, shape: str, num_frames: int, dice: Dice
) -> Actor:
  """Draws what an object is and does, in the middle of the picture's corner."""
  motion, unit = dice.pick(_MOTIONS), spec.image_size * render.UNIT
  size = dice.below(2)
  radius = dice.pick(spec.radii[size]) * unit // 1024
  actor = Actor(
    shape=shape,
    color=color,
    size=None if motion == "grows" else SIZES[size],
    motion=motion,
    radius=radius,
    angle=render.UPRIGHT[shape] + 5 * (dice.below(9) - 4),
    way=dice.pick(spec.way) * unit // 1024,
    delay=dice.between(num_frames // 4 + 1, num_frames // 2),
    upside_down=dice.chance(1, 2),
  )
  return actor.reversed() if dice.chance(1, 2) else actor


def _placed(
  actor: Actor,
  num_frames: int,
  taken: list[tuple[int, int, int, int]],
  image_size: int,
  dice: Dice,
) -> Actor | None:
  """Finds room for all that an object does; None if there is none.

  Played backwards it needs the same room.

  Args:
    actor: the object.
    num_frames: of the clip.
    taken: rooms of others; its own is added.
    image_size: pixels.
    dice: decide on the place.
  """
  extents = [s.extent for s in actor.track(num_frames) if s is not None]
  left, top = (min(e[axis] for e in extents) for axis in (0, 1))
  right, bottom = (max(e[axis] for e in extents) for axis in (2, 3))
  if max(right - left, bottom - top) > image_size - 2:
    return None
  for _ in range(_TRIES):
    x = dice.between(1 - left, image_size - 1 - right)
    y = dice.between(1 - top, image_size - 1 - bottom)
    room = left + x, top + y, right + x, bottom + y
    if not any(_touch(room, other) for other in taken):
      taken.append(room)
      return dataclasses.replace(actor, x=x, y=y)
  return None


def _touch(a: Sequence[int], b: Sequence[int]) -> bool:
  """Says whether less than a pixel is between two rooms."""
  return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
