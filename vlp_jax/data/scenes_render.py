"""Draws the pictures of the data sets `scenes` and `scenes_video`.

Everything is integer arithmetic on tables that are rounded far from ties, so
a picture is the same to the byte on every machine. Lengths and positions are
in 1/256 pixel ("units"), angles in degrees, x to the right, y down.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlp_jax.data.dice import Dice

UNIT = 256  # units in a pixel
_FULL = 128  # a pixel that is all covered; its product with 255 fits int16
_ONE = 1 << 14  # 1.0 in the tables of sines and in the proportions below

PALETTE = {
  "red": (222, 44, 40),
  "yellow": (238, 214, 40),
  "green": (36, 168, 52),
  "blue": (44, 84, 232),
  "purple": (166, 52, 184),
  "cyan": (60, 216, 230),
}


# The angle of `stencil` at which a shape stands as one would draw it.
UPRIGHT = {
  "circle": 0,
  "ring": 0,
  "square": 0,
  "cross": 0,
  "triangle": 90,
  "star": 270,
}


def _table(function) -> tuple[int, ...]:
  return tuple(round(function(math.radians(d)) * _ONE) for d in range(360))


_COS, _SIN = _table(math.cos), _table(math.sin)


@dataclasses.dataclass(frozen=True, eq=False)
class Stencil:
  """A shape at one radius and angle, not yet placed.

  Attributes:
    coverage: int16 `[h, w]`, 0..128, how much of each pixel is covered;
      trimmed to the pixels that are covered at all.
    box: (x0, y0, x1, y1) in pixels of the stencil, ends excluded: the
      pixels that are at least half covered.
    center: (x, y) of the pixel that the shape is drawn around.
  """

  coverage: np.ndarray
  box: tuple[int, int, int, int]
  center: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Sprite:
  """A stencil placed in a picture: its corner is at pixel (x, y)."""

  shape: str
  color: str
  size: str
  stencil: Stencil
  x: int
  y: int

  @property
  def box(self) -> tuple[int, int, int, int]:
    """Returns (x0, y0, x1, y1) in pixels of the picture, ends excluded."""
    x0, y0, x1, y1 = self.stencil.box
    return x0 + self.x, y0 + self.y, x1 + self.x, y1 + self.y

  @property
  def extent(self) -> tuple[int, int, int, int]:
    """Returns the same of all pixels that are covered at all."""
    height, width = self.stencil.coverage.shape
    return self.x, self.y, self.x + width, self.y + height


def _depth(shape: str, x: np.ndarray, y: np.ndarray, radius: int, angle: int):
  """Returns how deep inside the shape's edge a point is, in units.

  Every shape but the circle and the ring is made of half planes: a triangle is
  inside all of three, a five-pointed star inside all but one of five. The
  proportions give the shapes about the same visual weight.
  """

  def along(degrees):
    degrees %= 360
    return (x * _COS[degrees] + y * _SIN[degrees]) >> 14

  def scaled(percent):
    return radius * percent // 100

  if shape in ("circle", "ring"):
    # (r^2 - d^2) / 2r is the depth r - d near the edge, without a root.
    def disc(r):
      return (r * r - x * x - y * y) // (2 * r)

    outer = disc(scaled(100))
    return outer if shape == "circle" else np.minimum(outer, -disc(scaled(54)))
  if shape == "square":
    across = np.maximum(np.abs(along(angle)), np.abs(along(angle + 90)))
    return scaled(86) - across
  if shape == "cross":
    u, v = np.abs(along(angle)), np.abs(along(angle + 90))
    bars = np.minimum(
      np.maximum(u - scaled(32), v - scaled(112)),
      np.maximum(v - scaled(32), u - scaled(112)),
    )
    return -bars
  if shape == "triangle":
    sides = [along(angle + turn) for turn in (0, 120, 240)]
    return scaled(62) - np.maximum.reduce(sides)
  if shape == "star":
    sides = np.stack([along(angle + turn) for turn in range(0, 360, 72)])
    return scaled(40) - np.sort(sides, axis=0)[-2]
  raise ValueError(f"no such shape: {shape}")


@functools.cache
def stencil(shape: str, radius: int, angle: int, height: int = 100) -> Stencil:
  """Makes the stencil of a shape.

  Args:
    shape: one of `UPRIGHT`.
    radius: in units.
    angle: in degrees.
    height: percent that is left of the shape's height; negative: upside down.
  """
  reach = radius * 136 // (100 * UNIT) + 2
  steps = np.arange(-reach, reach + 1, dtype=np.int32) * UNIT
  rows = steps[:, None] * 100 // height
  depth = _depth(shape, steps[None, :], rows, radius, angle)
  coverage = _coverage(depth)
  x0, y0, x1, y1 = _extent(coverage > 0)
  coverage = coverage[y0:y1, x0:x1]
  coverage.setflags(write=False)  # it is shared
  box = _extent(coverage >= _FULL // 2)
  return Stencil(coverage, box, (reach - x0, reach - y0))


def _coverage(depth: np.ndarray) -> np.ndarray:
  """Turns depths, in units, of pixels' centres into their coverage, int16."""
  return (_clip(depth + UNIT // 2, 0, UNIT) * _FULL // UNIT).astype(np.int16)


def _blend(planes: np.ndarray, paint, coverage: np.ndarray) -> None:
  """Paints over `[3, h, w]`, in place."""
  planes += ((paint - planes) * coverage + _FULL // 2) // _FULL


def _clip(values: np.ndarray, low: int, high: int) -> np.ndarray:
  return np.minimum(np.maximum(values, low), high)  # np.clip is far slower


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
  columns, rows = mask.any(axis=0).nonzero()[0], mask.any(axis=1).nonzero()[0]
  return (
    int(columns[0]),
    int(rows[0]),
    int(columns[-1]) + 1,
    int(rows[-1]) + 1,
  )


def draw(sprites: Sequence[Sprite], image_size: int, dice: Dice) -> np.ndarray:
  """Draws a picture, uint8 `[image_size, image_size, 3]`.

  A smooth dark background, 0 to 2 grey lines, the sprites (each with its own
  tint and shading), and noise with a standard deviation from 2 to 10.
  """
  return draw_clip([[sprite] for sprite in sprites], image_size, dice)[0]


def draw_clip(
  tracks: Sequence[Sequence[Sprite | None]], image_size: int, dice: Dice
) -> np.ndarray:
  """Draws the frames of a clip, each as `draw` does.

  All but the sprites stands still, the noise included; what is drawn by lot
  does not depend on where the sprites are.

  Args:
    tracks: of each object its sprites, frame by frame; None where it is not.
    image_size: pixels to a side.
    dice: decide on all else.

  Returns:
    uint8 `[F, image_size, image_size, 3]`.
  """
  planes = _background(image_size, dice)
  for _ in range(dice.below(3)):
    _draw_line(planes, dice)
  frames = np.repeat(planes[None], len(tracks[0]), axis=0)
  for track in tracks:
    paint = _draw_paint(next(filter(None, track)).color, dice)
    shades = {}  # most objects look the same all the time
    for frame, sprite in zip(frames, track, strict=True):
      if sprite is not None:
        stencil = sprite.stencil
        if stencil not in shades:
          shades[stencil] = _shade(stencil, paint)
        x0, y0, x1, y1 = sprite.extent
        _blend(frame[:, y0:y1, x0:x1], shades[stencil], stencil.coverage)
  # The sum of four bytes is nearly normal, with standard deviation 147.8.
  noise = dice.bytes(4 * planes.size).reshape(4, *planes.shape)
  noise = noise.astype(np.int16)
  noise = noise[0] + noise[1] + noise[2] + noise[3] - 510
  frames += (noise * dice.between(4, 17) + 128) // 256
  frames = _clip(frames, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
  return np.ascontiguousarray(frames)


@functools.cache
def _ramp(image_size: int, knots: int) -> np.ndarray:
  """Returns weights of linear interpolation, int32 `[image_size, knots]`."""
  at = (np.arange(image_size) * 2 + 1) * (knots - 1) * 128 // image_size
  distance = np.abs(at[:, None] - np.arange(knots) * 256)
  return np.maximum(256 - distance, 0).astype(np.int32)


def _background(image_size: int, dice: Dice) -> np.ndarray:
  """Makes smooth planes, int16 `[3, image_size, image_size]`."""
  level = dice.between(35, 100)
  tints = [level + dice.between(-12, 12) for _ in range(3)]
  knots = dice.bytes(16).astype(np.int32).reshape(4, 4) % 53 - 26
  ramp = _ramp(image_size, 4)
  smooth = (ramp @ knots @ ramp.T >> 16).astype(np.int16)
  return np.stack([smooth + tint for tint in tints])


def _draw_line(planes: np.ndarray, dice: Dice) -> None:
  size = planes.shape[1]
  angle, grey = dice.below(360), dice.between(90, 170)
  width = dice.between(100, 220) * size // 64  # units, half of it to a side
  steps = np.arange(size, dtype=np.int32) * UNIT
  x = steps[None, :] - dice.below(size) * UNIT
  y = steps[:, None] - dice.below(size) * UNIT
  offset = np.abs(x * _COS[angle] + y * _SIN[angle]) >> 14
  _blend(planes, grey, _coverage(width // 2 - offset))


class _Paint(NamedTuple):
  """How an object is painted: its tint, and the light that falls on it."""

  color: np.ndarray
  angle: int
  strength: int


def _draw_paint(color: str, dice: Dice) -> _Paint:
  light = dice.between(232, 272)  # 256 = as in the palette
  tint = [c * light // 256 + dice.between(-16, 16) for c in PALETTE[color]]
  return _Paint(np.array(tint, np.int32), dice.below(360), dice.between(0, 44))


def _shade(stencil: Stencil, paint: _Paint) -> np.ndarray:
  """Returns the paint of a stencil's pixels, int16 `[3, h, w]`."""
  height, width = stencil.coverage.shape
  color, angle, strength = paint

  # From -strength to +strength across the sprite, again with 256 = 1.
  def slope(length: int, part: int) -> np.ndarray:
    steps = 2 * np.arange(length, dtype=np.int32) - (length - 1)
    return steps * (strength * part) // (max(height, width) << 14)

  shade = 256 + slope(width, _COS[angle]) + slope(height, _SIN[angle])[:, None]
  return _clip(color[:, None, None] * shade >> 8, 0, 255).astype(np.int16)


def encode_png(picture: np.ndarray) -> bytes:
  """Encodes uint8 `[H, W, 3]` as a PNG whose bytes depend on nothing else.

  Deflate's output differs between zlib versions, so the data are stored, in one
  block, which limits a picture to 65,535 bytes (147 pixels square). Each row is
  kept as differences from its left neighbours (filter 1), which the container's
  compression can work with.

  Raises:
    ValueError: if the picture is too large.
  """
  height, width, _ = picture.shape
  rows = np.ones((height, 1 + 3 * width), np.uint8)  # filter 1, then the bytes
  flat = picture.reshape(height, 3 * width)
  rows[:, 1:] = flat
  rows[:, 4:] -= flat[:, :-3]
  data = rows.tobytes()
  if len(data) > 0xFFFF:
    raise ValueError(f"{width} x {height} pixels do not fit one stored block")
  stored = b"".join(
    (
      b"\x78\x01\x01",
      struct.pack("<HH", len(data), len(data) ^ 0xFFFF),
      data,
      struct.pack(">I", zlib.adler32(data)),
    )
  )
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    _chunk(*chunk)
    for chunk in ((b"IHDR", header), (b"IDAT", stored), (b"IEND", b""))
  )


def _chunk(kind: bytes, data: bytes) -> bytes:
  body = kind + data
  return (
    struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
  )
