"""What may enter a data set: checks of pictures, clips, captions and paths.

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

from vlp_jax.data import clips, transforms

MAX_CAPTION = 10_000  # characters
MIN_SIDE = 8  # pixels
_JPEG_QUALITY = 95
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")
PICTURES = frozenset(
  (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif"),
    *(".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".j2k", ".mpo", ".ico", ".tga"),
  )
)
CLIPS = frozenset(
  (
    *(".mp4", ".webm", ".gif", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".ogv", ".3gp", ".ts"),
  )
)


class Rejected(clips.Reasoned):
  """A picture, clip, caption or path that cannot be used."""


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
  _refuse_markup(data, "not a picture")
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
  smaller = _reduced(decoded, image_size)
  if smaller is decoded and _is_plain(header):
    return data
  is_photo = header.format in ("JPEG", "MPO", "WEBP")
  return _encoded(smaller, "JPEG" if is_photo else "PNG")


def frames(
  data: clips.Data, most: int, min_side: int = MIN_SIDE, image_size: int = 0
) -> list[bytes]:
  """Checks a clip, and returns some of its frames, evenly spread.

  Args:
    data: of its file, or of its frames.
    most: so many frames, or all if there are fewer.
    min_side: least width and height in pixels.
    image_size: as `picture`.

  Returns:
    JPEG files.

  Raises:
    Rejected: `empty file`, `not a video`, `no video stream`, `no frames`,
      `damaged video`, `frames differ in size`, `damaged picture` (a frame) or
      `picture too small`.
  """
  _refuse_markup(data, "not a video")
  try:
    count = min(most, len(clips.open_clip(data)))
    found = clips.DecodeClip(count)(data)
  except transforms.UnreadableImage as e:
    raise _as_rejected(e) from e
  if min(found[0].size) < min_side:
    raise Rejected("picture too small", "{}x{}".format(*found[0].size))
  return [_encoded(_reduced(frame, image_size), "JPEG") for frame in found]


def clip(data: bytes) -> bytes:
  """Checks a clip by its first and its last frame, and returns it.

  Raises:
    Rejected: as `frames`.
  """
  _refuse_markup(data, "not a video")
  try:
    clips.check(data)
  except transforms.UnreadableImage as e:
    raise _as_rejected(e) from e
  return data


def _as_rejected(error: transforms.UnreadableImage) -> Rejected:
  reason = getattr(error, "reason", "damaged picture")
  return Rejected(reason, str(error))


def _refuse_markup(data: clips.Data, reason: str) -> None:
  """Raises `Rejected` on nothing, and on a page that says why there is none."""
  if not data:
    raise Rejected("empty file")
  if isinstance(data, bytes) and data[:64].lstrip().lower().startswith(_MARKUP):
    raise Rejected(reason, "HTML or XML")


def _reduced(image: Image.Image, image_size: int) -> Image.Image:
  """Returns a picture whose shorter side is at most `image_size`, if any."""
  short = min(image.size)
  if not image_size or short <= image_size:
    return image
  size = [max(image_size, round(s * image_size / short)) for s in image.size]
  return image.resize(size, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str) -> bytes:
  buffer = io.BytesIO()
  options = dict(quality=_JPEG_QUALITY, subsampling=0) if kind == "JPEG" else {}
  image.save(buffer, kind, **options)
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


def read_clip(folder: pathlib.Path, name: str) -> clips.Data:
  """Returns a clip that a source names: its file, or the frames in a folder.

  Frames are pictures, in the order of their names.

  Raises:
    Rejected: `no frames`, or as `inside`.
  """
  try:
    return read(folder, name)
  except Rejected as e:
    if e.reason != "is a folder":
      raise
  names = sorted(os.listdir(folder / name))
  found = [n for n in names if _is_frame(n)]
  if not found:
    raise Rejected("no frames")
  return [read(folder, os.path.join(name, n)) for n in found]


def _is_frame(name: str) -> bool:
  """Says whether a file in a folder is a frame, by its name."""
  suffix = os.path.splitext(name)[1].lower()
  return suffix in PICTURES and not name.startswith(".")


def _is_plain(header: Image.Image) -> bool:
  """Whether every program sees the same in the file as we do."""
  if header.mode != "RGB" or header.has_transparency_data:
    return False
  upright = header.getexif().get(0x0112, 1) == 1  # orientation
  single = getattr(header, "n_frames", 1) == 1
  return upright and single and header.format in ("JPEG", "PNG")
