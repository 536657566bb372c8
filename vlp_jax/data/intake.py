"""What may enter a data set: checks of pictures, captions and paths.

Whatever the web puts into a file, each check either returns what is to be
stored or raises `Rejected` with a reason. Reasons are few and fixed, so that
they can be counted; the record's name says which one it was.

A stored picture reads the same in any program: upright RGB JPEG and PNG files
are kept byte for byte; every other kind (CMYK, grey, palette, 16 bits, alpha,
GIF, WebP, EXIF rotation, ...) is converted, as `transforms.Decode` shows it.
"""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from PIL import Image

from vlp_jax.data import transforms

MAX_CAPTION = 10_000  # characters
MIN_SIDE = 8  # pixels
_JPEG_QUALITY = 95
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")


class Rejected(Exception):
  """A picture or caption that cannot be used.

  Attributes:
    reason: what is wrong, of a fixed set; `str()` may add details.
  """

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason} ({detail})" if detail else reason)
    self.reason = reason


def picture(
  data: bytes, min_side: int = MIN_SIDE, image_size: int = 0
) -> bytes:
  """Checks a picture by decoding all of it, and returns what to store.

  Args:
    data: an encoded picture, of any format that `transforms.Decode` reads.
    min_side: least width and height in pixels.
    image_size: if positive, a picture whose shorter side is longer is made
      smaller, to this side, and encoded again.

  Returns:
    An upright RGB picture without alpha, as JPEG or PNG; `data` itself where
    it is one.

  Raises:
    Rejected: `empty file`, `not a picture`, `damaged picture`, `picture too
      large` (by its header, before anything is decoded) or `picture too
      small`.
  """
  if not data:
    raise Rejected("empty file")
  if data[:64].lstrip().lower().startswith(_MARKUP):
    raise Rejected("not a picture", "HTML or XML")
  try:
    header = transforms.open_image(data)
  except transforms.OversizedImage as e:
    raise Rejected("picture too large", str(e)) from e
  except transforms.UnreadableImage as e:
    raise Rejected("not a picture") from e
  if min(header.size) < min_side:
    raise Rejected("picture too small", "{}x{}".format(*header.size))
  try:
    decoded = transforms.Decode()(data)
  except transforms.UnreadableImage as e:
    raise Rejected("damaged picture", str(e)) from e
  short = min(decoded.size)
  if image_size and short > image_size:
    size = [
      max(image_size, round(s * image_size / short)) for s in decoded.size
    ]
    decoded = decoded.resize(size, Image.Resampling.BICUBIC)
  elif _is_plain(header):
    return data
  buffer = io.BytesIO()
  if header.format in ("JPEG", "MPO", "WEBP"):
    decoded.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
  else:
    decoded.save(buffer, "PNG")
  return buffer.getvalue()


def caption(text: Any) -> str:
  """Returns a caption with its blanks and line ends collapsed.

  Raises:
    Rejected: `caption is not a string`, `caption is not UTF-8`, `caption
      holds NUL`, `empty caption` or `caption too long` (over 10,000
      characters).
  """
  if text is None:
    raise Rejected("empty caption", "null")
  if isinstance(text, bytes):
    text = text.decode("utf-8", "surrogateescape")
  if not isinstance(text, str):
    raise Rejected("caption is not a string", type(text).__name__)
  try:
    text.encode()
  except UnicodeEncodeError as e:  # lone surrogates
    raise Rejected("caption is not UTF-8") from e
  if "\0" in text:
    raise Rejected("caption holds NUL")
  text = " ".join(text.removeprefix("\ufeff").split())
  if not text:
    raise Rejected("empty caption")
  if len(text) > MAX_CAPTION:
    raise Rejected("caption too long", f"{len(text):,} characters")
  return text


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of a file that a source names.

  Args:
    folder: the source's; links in it may point anywhere inside it.
    name: as the source has it, relative to the folder.

  Raises:
    Rejected: `path leaves the source folder` (`../x`, absolute paths, links
      that point outside), `missing file`, `is a folder` or `unreadable file`.
  """
  try:
    path = (folder / name).resolve()
  except (OSError, ValueError, RuntimeError) as e:  # loops of links, NUL
    raise Rejected("unreadable file") from e
  if os.path.isabs(name) or not path.is_relative_to(folder.resolve()):
    raise Rejected("path leaves the source folder")
  try:
    if path.is_dir():
      raise Rejected("is a folder")
    if not path.exists():
      raise Rejected("missing file")
  except OSError as e:  # a name that is too long, no permission
    raise Rejected("unreadable file", e.strerror or "") from e
  return path


def read(folder: pathlib.Path, name: str) -> bytes:
  """Returns the bytes of a file that a source names; raises as `inside`."""
  path = inside(folder, name)
  try:
    if not path.is_file():  # pipes and devices
      raise Rejected("unreadable file", "not a regular file")
    return path.read_bytes()
  except OSError as e:
    raise Rejected("unreadable file", e.strerror or "") from e


def _is_plain(header: Image.Image) -> bool:
  """Whether every program sees the same in the file as we do."""
  if header.mode != "RGB" or header.has_transparency_data:
    return False
  upright = header.getexif().get(0x0112, 1) == 1  # orientation
  single = getattr(header, "n_frames", 1) == 1
  return upright and single and header.format in ("JPEG", "PNG")
