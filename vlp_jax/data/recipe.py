"""How records become the rows of a training batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlp_jax.data import captions as captions_lib
from vlp_jax.data import clips, randaugment, transforms
from vlp_jax.data.sources import Record, Source, UnreadableRecord
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.warn import warn_skipped
from vlp_jax.errors import UserError

Batch = dict[str, np.ndarray]
_Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_Image = Image.Image | list[Image.Image]

_AUGMENTS = ("none", "crop", "randaugment")
# After so many unreadable records in a row something else is wrong.
_MAX_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How records become the rows of a training batch.

  Attributes:
    source: of the records.
    decode: bytes to a picture, or to the frames of a clip.
    crop: a picture to pixels of their final size.
    augment: what is done to these pixels, in order; the same to all frames.
    clean: what is done to each caption.
    pick: the caption, of several.
    tokenize: captions to ids.
  """

  source: Source
  decode: transforms.Decode | clips.DecodeClip
  crop: transforms.RandomResizedCrop | transforms.Geometry
  augment: tuple[_Augment, ...]
  clean: Callable[[str], str]
  pick: transforms.PickCaption
  tokenize: transforms.Tokenize

  def make(
    self, indices: Sequence[int], places: Sequence[int], seed: int
  ) -> Batch:
    """Makes a batch.

    For small pictures it is a third faster to take all rows through one step
    after the other than row by row: the caches keep what a step runs.

    Args:
      indices: of the records.
      places: of the records in the endless order.
      seed: of the random numbers, together with the place.

    Returns:
      A batch, and `bad`, int32: how many records had to be replaced.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    records = [self._read(index) for index in indices]
    images, texts, image_ids, bad = [], [], [], 0
    for index, place, record in zip(indices, places, records, strict=True):
      if self._is_clip:
        _go_to(rng, place, stream=2)
      found = self._usable(index, record, rng)
      if found is None:
        bad += 1
        _go_to(rng, place, stream=1)
        found = self._another(index, rng)
      record, image = found
      frames = []
      for frame in image if self._is_clip else [image]:
        _go_to(rng, place)  # frames of a clip meet the same numbers
        pixels = self.crop(frame, rng)
        for transform in self.augment:
          pixels = transform(pixels, rng)
        frames.append(pixels)
      images.append(np.stack(frames) if self._is_clip else pixels)
      texts.append(self.pick(record["captions"], rng))
      image_ids.append(record["image_id"])
    text, text_len = self.tokenize(texts)
    return {
      "image": np.stack(images),
      "text": text,
      "text_len": text_len,
      "image_id": np.array(image_ids, np.int32),
      "bad": np.array(bad, np.int32),
    }

  def describe(self) -> list[str]:
    """Returns the transforms as text."""
    steps = [self.decode, self.crop, *self.augment]
    if self.clean is not str:
      steps.append(self.clean)
    return [repr(step) for step in (*steps, self.pick, self.tokenize)]

  @property
  def _is_clip(self) -> bool:
    return isinstance(self.decode, clips.DecodeClip)

  def _read(self, index: int) -> Record | None:
    try:
      return self.source.pair(index)
    except UnreadableRecord as e:
      self._skip(index, e.reason)
      return None

  def _usable(
    self, index: int, record: Record | None, rng: np.random.Generator
  ) -> tuple[Record, _Image] | None:
    """Returns a record with its captions cleaned, and its picture, if any."""
    if record is None:
      return None
    captions = [self.clean(caption) for caption in record["captions"]]
    captions = [caption for caption in captions if caption.strip()]
    try:
      if captions:
        image = self.decode(record["image"], rng)
        return record | {"captions": captions}, image
      reason = "no caption"
    except transforms.UnreadableImage as e:
      reason = str(e)
    self._skip(index, reason)
    return None

  def _another(
    self, index: int, rng: np.random.Generator
  ) -> tuple[Record, _Image]:
    """Draws a usable record in place of one that is not.

    It depends on the data, the seed and the place alone, so that batches stay
    a function of their number.
    """
    peers = self.source.peers(index)
    order = grain.MapDataset.range(peers.start, peers.stop)
    order = order.shuffle(seed=int(rng.integers(2**32)))
    tries = min(len(peers), _MAX_TRIES)
    for at in (order[number] for number in range(tries)):
      found = self._usable(at, self._read(at), rng)
      if found is not None:
        return found
    raise UserError(
      f"{self.source.name}: {tries} records in a row have no readable picture "
      f"and caption, beside {self.source.describe(index)}"
    )

  def _skip(self, index: int, reason: str) -> None:
    warn_skipped(self.source.name, self.source.describe(index), reason)


def make_recipe(
  source: Source, tokenizer: Tokenizer, config: ConfigDict
) -> Recipe:
  """Returns the recipe that a config asks for.

  Args:
    source: of the records.
    tokenizer: for the captions.
    config: `tokenizer.max_len` and `data.{augment, crop_scale, flip,
      eval_resize, image_size, num_frames, clean_captions, max_words}`.

  Raises:
    UserError: if one of these fields has no possible value.
  """
  data = config.data
  _check(data)
  scale = tuple(float(s) for s in data.crop_scale)
  crop, smallest = transforms.eval_geometry(data), 1.0
  if data.augment != "none":
    crop = transforms.RandomResizedCrop(data.image_size, scale)
    smallest = scale[0]
  augment = []
  if data.flip:
    augment.append(transforms.RandomFlip(float(data.flip)))
  if data.augment == "randaugment":
    augment.append(randaugment.RandAugment())
  # Twice the pixels that the crop needs leave the resize as good as exact
  # (only large JPEGs are concerned).
  min_side = int(np.ceil(2 * data.image_size / np.sqrt(max(smallest, 1e-2))))
  decode = transforms.Decode(min_side)
  if data.num_frames:
    decode = clips.DecodeClip(data.num_frames, min_side)
  return Recipe(
    source=source,
    decode=decode,
    crop=crop,
    augment=tuple(augment),
    clean=captions_lib.cleaner(data),
    pick=transforms.PickCaption(),
    tokenize=transforms.Tokenize(config.tokenizer.max_len, tokenizer),
  )


def _check(data: ConfigDict) -> None:
  """Raises a `UserError` on values that mean nothing."""
  if data.augment not in _AUGMENTS:
    raise UserError(
      f"data.augment={data.augment!r} is unknown; it is {', '.join(_AUGMENTS)}"
    )
  low, high = data.crop_scale if len(data.crop_scale) == 2 else (0, 0)
  if not 0 < low <= high <= 1:
    raise UserError(
      f"data.crop_scale={tuple(data.crop_scale)} is no range of shares: it is "
      "(LOW, HIGH) with 0 < LOW <= HIGH <= 1"
    )
  for field in ("flip", "max_bad"):
    if not 0 <= data[field] <= 1:
      raise UserError(f"data.{field}={data[field]} is not in [0, 1]")
  if data.max_words < 0 or (data.max_words and not data.clean_captions):
    raise UserError(
      f"data.max_words={data.max_words} is 0 (all words), or a number of words "
      "with data.clean_captions=true"
    )


def _go_to(rng: np.random.Generator, place: int, stream: int = 0) -> None:
  """Takes a Philox generator to a stream of a place; cheaper than a new one.

  The counter's last words are stream and place; its first counts the numbers
  drawn. Stream 0 is of crops and captions, 1 of records that stand in for
  others, 2 of the frames of clips.
  """
  state = rng.bit_generator.state
  state["state"]["counter"] = np.array([0, 0, stream, place], np.uint64)
  state["buffer_pos"], state["has_uint32"] = 4, 0  # nothing is left over
  rng.bit_generator.state = state
