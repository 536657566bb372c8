"""What is done to a picture and its caption on the host.

Each transform is a small frozen dataclass: picklable, and its `repr` goes into
the data's fingerprint. Pixels leave the host as uint8 at their final size;
normalising is in the model. RandAugment and what is done to captions have
files of their own.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict
from PIL import ExifTags, Image, ImageOps

from vlp_jax.errors import UserError

if TYPE_CHECKING:  # sources need transforms, and the tokenizer needs sources
  from vlp_jax.data.tokenizer import Tokenizer

# Formats whose decoders run no other program (PostScript's does).
_FORMATS = (
  *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"),
  *("MPO", "ICO", "TGA"),
)

_PNG_EXIF = frozenset(["exif", "Raw profile type exif"])


class UnreadableImage(UserError):
  """Bytes that are no picture, or a damaged one."""


class OversizedImage(UnreadableImage):
  """A decompression bomb: by its header, of over 178 million pixels."""


@dataclasses.dataclass(frozen=True)
class Decode:
  """Encoded bytes to an upright RGB picture, transparency on white.

  Attributes:
    min_side: if positive, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
      size while both sides stay at least this long, which is several times
      faster for large photographs.
  """

  min_side: int = 0

  def __call__(
    self, data: bytes, rng: np.random.Generator | None = None
  ) -> Image.Image:
    """Returns a picture of mode RGB; nothing is drawn.

    Raises:
      UnreadableImage: whatever the decoder's complaint.
    """
    del rng
    image = open_image(data)
    try:
      if self.min_side and image.format in ("JPEG", "MPO"):
        image.draft("RGB", (self.min_side, self.min_side))
      image.load()
      return to_rgb(_upright(image))
    except Exception as e:  # decoders raise all sorts on damaged files
      raise UnreadableImage(_reason(e)) from e


def open_image(data: bytes) -> Image.Image:
  """Reads a picture's header; its pixels are not decoded yet.

  Raises:
    OversizedImage: if the header promises too many pixels.
    UnreadableImage: if the bytes are no picture.
  """
  try:
    return Image.open(io.BytesIO(data), formats=_FORMATS)
  except Image.DecompressionBombError as e:
    raise OversizedImage(_reason(e)) from e
  except Exception as e:  # decoders raise all sorts on damaged files
    raise UnreadableImage(_reason(e)) from e


def upright_size(data: bytes) -> tuple[int, int]:
  """Reads width and height off a picture's header, as `Decode` would have it.

  Raises:
    UnreadableImage: if the bytes are no picture.
  """
  image = open_image(data)
  try:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
  except Exception as e:  # decoders raise all sorts on damaged files
    raise UnreadableImage(_reason(e)) from e
  return image.size[::-1] if turned else image.size


def _reason(error: Exception) -> str:
  reason = str(error).replace("\n", " ") or type(error).__name__
  return f"picture cannot be decoded ({reason})"


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop:
  """The evaluation geometry: short side to `size`, then the central square.

  Bicubic and antialiased, as torchvision's Resize and CenterCrop. A square
  picture of the right size stays as it is.
  """

  size: int

  def __call__(
    self, image: Image.Image, rng: np.random.Generator | None = None
  ) -> np.ndarray:
    """Returns uint8 `[size, size, 3]`; nothing is drawn."""
    del rng
    width, height, left, top = self.place(*image.size)
    if image.size != (width, height):
      image = image.resize((width, height), Image.Resampling.BICUBIC)
    if width != height:
      image = image.crop((left, top, left + self.size, top + self.size))
    return np.asarray(image)

  def place(self, width: int, height: int) -> tuple[int, int, int, int]:
    """Says where a picture of this size goes.

    Returns:
      Width and height after resizing, and left and top edge of the square
      that is cut out of that.
    """
    short = min(width, height)
    width = max(self.size, int(self.size * width / short))
    height = max(self.size, int(self.size * height / short))
    left = round((width - self.size) / 2)
    top = round((height - self.size) / 2)
    return width, height, left, top


@dataclasses.dataclass(frozen=True)
class Stretch:
  """The other evaluation geometry: resized to a square, whatever its shape.

  Bicubic and antialiased; nothing is cut off.
  """

  size: int

  def __call__(
    self, image: Image.Image, rng: np.random.Generator | None = None
  ) -> np.ndarray:
    """Returns uint8 `[size, size, 3]`; nothing is drawn."""
    del rng
    if image.size != (self.size, self.size):
      image = image.resize((self.size,) * 2, Image.Resampling.BICUBIC)
    return np.asarray(image)

  def place(self, width: int, height: int) -> tuple[int, int, int, int]:
    """Says where a picture goes, as `ResizeCenterCrop.place`."""
    del width, height
    return self.size, self.size, 0, 0


Geometry = ResizeCenterCrop | Stretch


def eval_geometry(data: ConfigDict) -> Geometry:
  """Returns how pictures become squares where nothing is drawn.

  Args:
    data: `eval_resize` and `image_size`.

  Raises:
    UserError: if there is no such geometry.
  """
  kinds = {"crop": ResizeCenterCrop, "stretch": Stretch}
  if data.eval_resize not in kinds:
    raise UserError(
      f"data.eval_resize={data.eval_resize!r} is unknown; it is "
      f"{' or '.join(kinds)}"
    )
  return kinds[data.eval_resize](data.image_size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A random part of the picture, resized to a square (Szegedy et al., 2015).

  Attributes:
    size: of the result, in pixels.
    scale: range of the part's share of the area.
    ratio: range of the part's width over its height, drawn log-uniformly.
  """

  size: int
  scale: tuple[float, float] = (0.9, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)

  def box(
    self, width: int, height: int, rng: np.random.Generator
  ) -> tuple[int, int, int, int]:
    """Draws (left, top, right, bottom) in a picture of this size."""
    for _ in range(10):
      area = width * height * rng.uniform(*self.scale)
      aspect = math.exp(rng.uniform(*map(math.log, self.ratio)))
      w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if 0 < w <= width and 0 < h <= height:
        left = int(rng.integers(width - w + 1))
        top = int(rng.integers(height - h + 1))
        return left, top, left + w, top + h
    # The whole picture, or as much of its middle as the ratio allows.
    w = max(1, min(width, round(height * self.ratio[1])))
    h = max(1, min(height, round(width / self.ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> np.ndarray:
    """Returns uint8 `[size, size, 3]`."""
    image = image.crop(self.box(*image.size, rng))
    if image.size != (self.size, self.size):
      image = image.resize((self.size,) * 2, Image.Resampling.BICUBIC)
    return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
  """A picture or its mirror image; beware of captions with left and right.

  Attributes:
    probability: of the mirror image.
  """

  probability: float

  def __call__(
    self, pixels: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """Returns uint8 `[H, W, 3]`, as `pixels` is."""
    return pixels[:, ::-1] if rng.random() < self.probability else pixels


@dataclasses.dataclass(frozen=True)
class PickCaption:
  """One of a picture's captions, drawn anew at every visit."""

  def __call__(self, captions: Sequence[str], rng: np.random.Generator) -> str:
    return captions[int(rng.integers(len(captions)))]


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """Captions to ids.

  Attributes:
    max_len: number of ids, SOT, EOT and pads included.
    tokenizer: left out of the repr, since its hash says more.
  """

  max_len: int
  tokenizer: Tokenizer = dataclasses.field(repr=False)

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids int32 `[N, max_len]` and lengths before the pads `[N]`."""
    return self.tokenizer.encode_batch(texts, self.max_len)


def _upright(image: Image.Image) -> Image.Image:
  """Turns a picture as its EXIF orientation says."""
  if image.format == "PNG" and _PNG_EXIF.isdisjoint(image.info):
    return image  # looking again costs a fifth of a small PNG's decoding
  ImageOps.exif_transpose(image, in_place=True)  # else it is a copy
  return image


def to_rgb(image: Image.Image) -> Image.Image:
  """Returns a picture of mode RGB, transparency on white."""
  if image.mode.startswith("I"):  # 16 bits a pixel
    values = np.asarray(image).astype(np.int64) >> 8
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image if image.mode == "RGB" else image.convert("RGB")
