"""Sheets of pictures and texts, laid out in inches so that nothing overlaps.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and a
verdict is always a word as well.
"""

from __future__ import annotations

import functools
import math
import pathlib
import warnings
from collections.abc import Sequence

import jax
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, GREY = "#1a1a1a", "#595959"
# Word, colour and line of a frame.
HEAT = "magma"  # colours of heat maps
RIGHT = ("right", "#007a59", "-")
WRONG = ("wrong", "#c44e00", "--")
ALSO_TRUE = ("also true", "#0072b2", "-.")
TRUE = ("true", *RIGHT[1:])
FALSE = ("false", *WRONG[1:])
PLAIN = ("", "#b3b3b3", "-")
LINES = (
  *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
  *("#56b4e9", "#8f6b00", "#1a1a1a"),
)

MARGIN = 0.35
BODY, SMALL = 11, 10
LINE = 1.35 / 72  # from line to line, over the size of the letters
_DPI = 110
# After DejaVu Sans, which comes with matplotlib, for what it lacks.
_MORE_FONTS = (
  *("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic"),
  *("Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai"),
  *("Arial Unicode MS", "Hiragino Sans", "PingFang SC", "Microsoft YaHei"),
  *("WenQuanYi Zen Hei", "Unifont", "Noto Emoji"),
)


@functools.cache
def fonts() -> list[str]:
  """Lists the installed fonts to look a letter up in, best first."""
  installed = set(font_manager.get_font_names())
  return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]


def style() -> matplotlib.RcParams:
  """Returns the context of all drawing: fonts, and no TeX in users' texts."""
  return matplotlib.rc_context(
    {
      "font.family": fonts(),
      "font.size": BODY,
      "text.color": INK,
      "text.parse_math": False,
      "axes.spines.top": False,
      "axes.spines.right": False,
    }
  )


@functools.cache
def _font():
  return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


@functools.lru_cache(maxsize=4096)
def _advance(letter: str) -> float:
  """Returns a letter's width over the font's size."""
  font = _font()
  if not font.get_char_index(ord(letter)):
    return 1.2  # in another font, or the box for a letter that none has
  font.set_size(100, 72)
  glyph = font.load_char(ord(letter))
  return glyph.linearHoriAdvance / 65536 / 100


def _width(text: str, size: float) -> float:
  """Measures a line in inches."""
  return sum(map(_advance, text)) * size / 72


def fold(text: str, inches: float, size: float, lines: int) -> list[str]:
  """Breaks a text to a width, and ends it with an ellipsis if it is longer.

  Args:
    text: any text; spaces and line ends count as one space.
    inches: width to fill.
    size: of the letters, in points.
    lines: most lines to return.
  """

  def fits(line):
    return _width(line, size) <= inches

  rows, row = [], ""
  for word in text.split():
    joined = f"{row} {word}" if row else word
    if fits(joined):
      row = joined
      continue
    if row:
      rows.append(row)
    while len(word) > 1 and not fits(word):  # no space to break at
      cut = next(n for n in range(len(word), 0, -1) if fits(word[:n]) or n < 2)
      rows.append(word[:cut])
      word = word[cut:]
    row = word
  rows.append(row)
  if len(rows) > lines:
    last = rows[lines - 1]
    while last and not fits(last + "…"):
      last = last[:-1]
    rows = [*rows[: lines - 1], last.rstrip(" ,.;") + "…"]
  return rows


class Sheet:
  """A figure with a title, how to read it, and what is put at (x, y).

  Positions and sizes are inches from the left upper corner of the body,
  which is below the head and inside the margins.
  """

  def __init__(
    self,
    title: str,
    explanation: str,
    width: float,
    height: float,
    legend: Sequence[tuple[str, str]] = (),
  ):
    """Draws the head.

    Args:
      title: one line.
      explanation: how to read the picture.
      width: of the body.
      height: of the body.
      legend: (colour, meaning) pairs.
    """
    self._width = width + 2 * MARGIN
    lines = fold(explanation, width, BODY, 6)
    below = 0.34 if legend else 0.08
    head = 0.45 + len(lines) * LINE * BODY + below
    self._top = MARGIN + head
    self._height = self._top + height + MARGIN
    self.figure = Figure(
      figsize=(self._width, self._height), dpi=_DPI, facecolor="white"
    )
    self.text(0, -head, title, size=15, weight="bold")
    self.text(0, 0.4 - head, lines, color=GREY)
    at = 0.0
    for color, meaning in legend:
      box = self._box(at, -0.28, 0.16, 0.16)
      self.figure.add_artist(
        Rectangle(box[:2], *box[2:], facecolor=color, edgecolor="none")
      )
      self.text(at + 0.22, -0.29, meaning, size=SMALL)
      at += 0.5 + _width(meaning, SMALL)

  def _box(self, x, y, width, height):
    """Turns inches into the figure's fractions, counted from below."""
    return (
      (MARGIN + x) / self._width,
      1 - (self._top + y + height) / self._height,
      width / self._width,
      height / self._height,
    )

  def text(self, x, y, text: str | list[str], *, size=BODY, **style) -> None:
    """Writes a line, or several, from the left upper corner (x, y)."""
    for i, line in enumerate([text] if isinstance(text, str) else text):
      # By the base line: the top would shift with the letters that there are.
      base = y + size / 72 * 0.95 + i * size * LINE
      left, bottom, *_ = self._box(x, base, 0, 0)
      self.figure.text(left, bottom, line, fontsize=size, **style)

  def axes(self, x: float, y: float, width: float, height: float):
    """Returns axes that fill a box."""
    return self.figure.add_axes(self._box(x, y, width, height))

  def image(self, x, y, side, pixels: np.ndarray, verdict=PLAIN):
    """Shows a picture in a square, framed by a verdict; returns its axes.

    A clip `[F, H, W, 3]` is shown as `mosaic` lays it out. The axes'
    coordinates are fractions of what is shown, y downwards.
    """
    axes = self.axes(x, y, side, side)
    if pixels.ndim == 4:
      cells = _cells(len(pixels))
      pixels = mosaic(pixels, 255)
      for edge in range(1, cells):
        axes.axhline(edge / cells, color="white", linewidth=1.5)
        axes.axvline(edge / cells, color="white", linewidth=1.5)
    axes.imshow(
      pixels, extent=(0, 1, 1, 0), interpolation="nearest", aspect="auto"
    )
    axes.set(xticks=[], yticks=[])
    _, color, line = verdict
    for spine in axes.spines.values():
      spine.set(
        visible=True,
        color=color,
        linestyle=line,
        linewidth=1 if verdict is PLAIN else 3.5,
      )
    return axes

  def verdict(self, x, y, verdict, more: str = "") -> None:
    """Writes the word of a verdict in its colour, and more."""
    word, color, _ = verdict
    self.text(x, y, word + more, color=color, weight="bold", size=SMALL)

  def save(self, path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG, on the first host alone."""
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      with warnings.catch_warnings():
        # A letter that no font has is shown as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        FigureCanvasAgg(self.figure).print_png(str(path))
    return path


def _cells(num_frames: int) -> int:
  """Returns the frames in a row of a `mosaic`, which has as many rows."""
  return math.isqrt(num_frames - 1) + 1


def mosaic(frames: np.ndarray, blank: float) -> np.ndarray:
  """Lays frames out row by row, as in a book, in the shape of one of them.

  Args:
    frames: `[F, H, W, ...]`.
    blank: fills the cells after the last frame.

  Returns:
    `[n H, n W, ...]`, where n is the least whole number with n^2 >= F.
  """
  cells, (count, height, width, *rest) = _cells(len(frames)), frames.shape
  empty = (cells**2 - count, height, width, *rest)
  frames = np.concatenate([frames, np.full(empty, blank, frames.dtype)])
  grid = frames.reshape(cells, cells, height, width, *rest).swapaxes(1, 2)
  return grid.reshape(cells * height, cells * width, *rest)


def in_mosaic(boxes: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
  """Moves boxes, listed for each frame, to where `mosaic` puts the frame.

  Coordinates are fractions: of a frame, then of the mosaic.
  """
  cells, moved = _cells(len(boxes)), []
  for place, frame in enumerate(boxes):
    row, column = divmod(place, cells)
    for x0, y0, x1, y1 in frame:
      corners = (column + x0, row + y0, column + x1, row + y1)
      moved.append([at / cells for at in corners])
  return moved


def draw_heat(
  axes, heat: np.ndarray, boxes: Sequence[Sequence[float]]
) -> bool | None:
  """Lays a heat map and boxes over a picture, or over a clip's mosaic.

  Args:
    axes: of `Sheet.image`.
    heat: `[rows, columns]`, or `[F, rows, columns]` of a clip.
    boxes: x0, y0, x1, y1 in the axes' coordinates.

  Returns:
    Whether the strongest patch lies in a box; None if there is no strongest
    one: a map of gradients that are all negative is zero everywhere.
  """
  if heat.ndim == 3:
    heat = mosaic(heat, np.nan)
  axes.imshow(
    heat,
    extent=(0, 1, 1, 0),
    cmap=HEAT,
    alpha=0.6,
    interpolation="nearest",
    aspect="auto",
  )
  for x0, y0, x1, y1 in boxes:
    for color, width, line in (("black", 3.5, "-"), ("white", 1.8, "--")):
      axes.add_patch(
        Rectangle(
          (x0, y0),
          x1 - x0,
          y1 - y0,
          fill=False,
          edgecolor=color,
          linewidth=width,
          linestyle=line,
        )
      )
  known = heat[~np.isnan(heat)]
  if not known.size or known.max() == known.min():
    return None
  rows, columns = heat.shape
  row, column = np.unravel_index(np.nanargmax(heat), heat.shape)
  x, y = (column + 0.5) / columns, (row + 0.5) / rows
  axes.plot(x, y, "X", markersize=11, color="white", markeredgecolor="black")
  return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)
