"""Clips: their frames, wherever they are.

A clip is the bytes of a file, or a list of encoded pictures, its frames. Files
of moving pictures (GIF, WebP, PNG) are read by Pillow, all others (MP4, WebM,
AVI, ...) by PyAV, the extra `video`. A picture is a clip of one frame.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Protocol

import numpy as np
from PIL import Image

from vlp_jax.data import transforms
from vlp_jax.data.transforms import UnreadableImage
from vlp_jax.errors import UserError

Data = bytes | Sequence[bytes]

# A file whose last frame ends before this share of what its header promises
# breaks off; some headers are a little wrong.
_COMPLETE = 0.95


class Reasoned(Exception):
  """Why something cannot be used, so that it can be counted.

  Attributes:
    reason: what is wrong, of a fixed set; `str()` may add details.
  """

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason} ({detail})" if detail else reason)
    self.reason = reason


class UnreadableClip(Reasoned, UnreadableImage):
  """Bytes that are no clip, or a damaged one."""


class Clip(Protocol):
  """A clip that is open."""

  def __len__(self) -> int:
    """Returns the number of frames, at least 1."""

  def frames(self, places: Sequence[int]) -> Iterator[Image.Image]:
    """Yields the frames at places, ascending and distinct, as RGB pictures."""


@dataclasses.dataclass(frozen=True)
class DecodeClip:
  """A clip to some of its frames, spread over all of it.

  Attributes:
    num_frames: how many; a clip with fewer repeats some.
    min_side: see `transforms.Decode`; of frames that are pictures.
  """

  num_frames: int
  min_side: int = 0

  def __call__(
    self, data: Data, rng: np.random.Generator | None = None
  ) -> list[Image.Image]:
    """Returns `num_frames` RGB pictures of one size.

    Args:
      data: of the clip.
      rng: draws the frames; without it they are those that `places` says.

    Raises:
      UnreadableClip: whatever the decoder's complaint.
      UserError: if it takes PyAV, which is not installed.
    """
    clip = open_clip(data, self.min_side)
    wanted = places(len(clip), self.num_frames, rng)
    distinct = sorted(set(wanted))
    found = dict(zip(distinct, clip.frames(distinct), strict=True))
    if len({frame.size for frame in found.values()}) > 1:
      raise UnreadableClip("frames differ in size")
    return [found[place] for place in wanted]


def check(data: Data) -> None:
  """Opens a clip, and decodes its first and its last frame.

  Raises:
    UnreadableImage: if it is no clip, or one that breaks off.
    UserError: if it takes PyAV, which is not installed.
  """
  clip = open_clip(data)
  for _ in clip.frames(sorted({0, len(clip) - 1})):
    pass


def places(
  count: int, num_frames: int, rng: np.random.Generator | None = None
) -> list[int]:
  """Chooses frames of a clip: one of each of so many equal segments.

  Args:
    count: frames of the clip, positive.
    num_frames: segments.
    rng: draws a frame of each segment; without it, it is the one in the middle.

  Returns:
    Ascending numbers in [0, count).
  """
  if rng is None:
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]
  bounds = [i * count // num_frames for i in range(num_frames + 1)]
  return [
    int(rng.integers(low, max(high, low + 1)))
    for low, high in itertools.pairwise(bounds)
  ]


def open_clip(data: Data, min_side: int = 0) -> Clip:
  """Opens a clip.

  Args:
    data: of a file, or of each frame.
    min_side: see `transforms.Decode`; of frames that are pictures.

  Raises:
    UnreadableClip: if there is none, or no frame in it.
    UserError: if it takes PyAV, which is not installed.
  """
  if not data:
    raise UnreadableClip("empty file" if data == b"" else "no frames")
  if not isinstance(data, bytes):
    return _Pictures(data, transforms.Decode(min_side))
  try:
    picture = transforms.open_image(data)
  except transforms.OversizedImage:
    raise
  except UnreadableImage:
    return _File(data)
  if picture.format == "GIF" and not data.rstrip(b"\0").endswith(b";"):
    raise UnreadableClip("damaged video", "it breaks off")
  try:
    count = getattr(picture, "n_frames", 1)
  except Exception as e:  # decoders raise all sorts on damaged files
    raise UnreadableClip("damaged video", _detail(e)) from e
  if count == 1:
    return _Pictures([data], transforms.Decode(min_side))
  return _Animation(picture, count)


@dataclasses.dataclass(frozen=True)
class _Pictures:
  """Frames that are pictures."""

  data: Sequence[bytes]
  decode: transforms.Decode

  def __len__(self) -> int:
    return len(self.data)

  def frames(self, places: Sequence[int]) -> Iterator[Image.Image]:
    for place in places:
      yield self.decode(self.data[place])


@dataclasses.dataclass(frozen=True)
class _Animation:
  """A file with frames that Pillow reads, in order."""

  picture: Image.Image
  count: int

  def __len__(self) -> int:
    return self.count

  def frames(self, places: Sequence[int]) -> Iterator[Image.Image]:
    for place in places:
      try:
        self.picture.seek(place)
        yield transforms.to_rgb(self.picture.copy())
      except Exception as e:  # decoders raise all sorts on damaged files
        raise UnreadableClip("damaged video", _detail(e)) from e


class _File:
  """A file with a video stream that PyAV reads."""

  def __init__(self, data: bytes):
    """Opens the file, and lists its frames without decoding them.

    Raises:
      UnreadableClip: if there is no video stream, or the file breaks off.
      UserError: if PyAV is not installed.
    """
    self._av = _import_av()
    try:
      self._container = self._av.open(io.BytesIO(data))
      if not self._container.streams.video:
        raise UnreadableClip("no video stream")
      self._stream = self._container.streams.video[0]
      self._stream.thread_type = "NONE"  # clips are decoded side by side
      end = self._list()
    except (self._av.FFmpegError, ValueError) as e:
      raise UnreadableClip("not a video", _detail(e)) from e
    if not self._times:
      raise UnreadableClip("no frames")
    promised = (self._container.duration or 0) / self._av.time_base  # seconds
    if len(self._times) < self._stream.frames or end < _COMPLETE * promised:
      raise UnreadableClip("damaged video", "it breaks off")

  def _list(self) -> float:
    """Lists the frames' times; returns the second at which the file ends."""
    times, keys, end = set(), set(), 0.0
    for packet in self._container.demux():
      if packet.pts is None:  # at the end of a stream
        continue
      if packet.stream_index == self._stream.index:
        times.add(packet.pts)
        if packet.is_keyframe:
          keys.add(packet.pts)
      last = packet.pts + (packet.duration or 0)
      end = max(end, float(last * packet.time_base))
    self._times, self._keys = sorted(times), sorted(keys)
    return end

  def __len__(self) -> int:
    return len(self._times)

  def frames(self, places: Sequence[int]) -> Iterator[Image.Image]:
    wanted = [self._times[place] for place in places]
    try:
      for key, times in itertools.groupby(wanted, self._key_before):
        yield from self._decoded(key, list(times))
    except (self._av.FFmpegError, ValueError) as e:
      raise UnreadableClip("damaged video", _detail(e)) from e

  def _key_before(self, time: int) -> int:
    """Returns the time of the key frame from which a frame is decoded."""
    before = bisect.bisect_right(self._keys, time) - 1
    return self._keys[before] if before >= 0 else self._times[0]

  def _decoded(self, start: int, times: list[int]) -> Iterator[Image.Image]:
    """Decodes the frames of these times, from a key frame on."""
    self._container.seek(start, stream=self._stream)
    for frame in self._container.decode(self._stream):
      if frame.pts is not None and frame.pts >= times[0]:
        yield frame.to_image()
        times.pop(0)
        if not times:
          return
    raise UnreadableClip("damaged video", "it breaks off")


def _import_av() -> ModuleType:
  try:
    import av
  except ImportError as e:
    raise UserError(
      "reading such clips needs PyAV: pip install 'vlp_jax[video]'"
    ) from e
  return av


def _detail(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
