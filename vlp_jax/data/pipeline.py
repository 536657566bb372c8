"""Batches of a source: for training, and every picture once for evaluation.

Training batch k is a function of (data config, seeds, k, host) alone: there
is no iterator state to save, a run goes on at `start_step`, and the global
batch is the same for any number of workers, threads and hosts. To that end
the data set stays random-access up to the batch:

  indices -> shuffle -> repeat -> a host's batches -> [start_step:]

Every epoch has its own order, in which each record comes exactly once;
batches run on across epochs, so a batch may be larger than the data set.
At its place in this endless order a picture is cropped and one of its captions
drawn, with random numbers that depend on the seed and the place.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from vlp_jax.data import transforms
from vlp_jax.data.sources import Record, Source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.warn import warn_skipped
from vlp_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Whole batches are made ahead, one by each thread. Decoders leave the
# interpreter free, the rest does not: with more threads than cores, or more
# than these, they only get in one another's way.
_MAX_THREADS = 8
_BUFFERED_BATCHES = 4
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")  # not on macOS
# After so many unreadable records in a row something else is wrong.
_MAX_SKIPS = 1000


class Batches(Iterator[Batch]):
  """An iterator over batches that are made ahead of time.

  `close()` ends its threads and worker processes; so does leaving its `with`
  block, dropping it, or the end of the program.
  """

  def __init__(self, dataset: grain.IterDataset):
    self._iterator = iter(dataset)
    self._closer = weakref.finalize(self, self._iterator.close)

  def __next__(self) -> Batch:
    return next(self._iterator)

  def close(self) -> None:
    """Ends the threads and worker processes; a second time does nothing."""
    self._closer()

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *exc: Any) -> None:
    self.close()


def train_batches(
  source: Source,
  tokenizer: Tokenizer,
  config: ConfigDict,
  *,
  start_step: int = 0,
  host: int = 0,
  num_hosts: int = 1,
) -> Batches:
  """Returns the endless training batches from `start_step` on.

  Args:
    source: the training split.
    tokenizer: for the captions.
    config: `batch_size` (of all hosts), `seed`, `tokenizer.max_len` and
      `data.{seed, augment, crop_scale, image_size, num_workers}`. Both seeds
      matter: `seed` for the whole run, `data.seed` for the data alone.
    start_step: k of the first batch.
    host: which block of rows of the global batch to return.
    num_hosts: number of blocks.

  Returns:
    An iterator of batches of b = batch_size / num_hosts rows: `image` uint8
    `[b, S, S, 3]`, `text` int32 `[b, L]`, `text_len` int32 `[b]` and
    `image_id` int32 `[b]`.

  Raises:
    UserError: if `batch_size` is not a multiple of `num_hosts`, or
      `data.augment` is unknown. The iterator raises one if no record is
      readable; single ones that are not are replaced by the next that is, and
      named on stderr.
  """
  if config.batch_size % num_hosts:
    raise UserError(
      f"batch_size={config.batch_size} is not a multiple of the {num_hosts} "
      "hosts; choose one that is"
    )
  local = config.batch_size // num_hosts
  seeds = np.random.SeedSequence(
    [config.seed % 2**32, config.data.seed % 2**32]
  )
  order_seed, visit_seed = seeds.generate_state(2).tolist()
  order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
  rows = range(config.batch_size)[host * local : (host + 1) * local]
  recipe = _recipe(source, tokenizer, config)
  dataset = _HostBatches(
    order.repeat(None), recipe, visit_seed, config.batch_size, rows
  ).slice(slice(start_step, None))
  workers = config.data.num_workers
  if not workers:
    return Batches(dataset.to_iter_dataset(_read_options()))
  _parse_no_flags()
  dataset = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
  options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
  return Batches(dataset.mp_prefetch(options))


def eval_images(
  source: Source, config: ConfigDict, batch_size: int
) -> Iterator[Batch]:
  """Yields every picture once, in order, in the evaluation geometry.

  Row r of batch k is record `k * batch_size + r`.

  Args:
    source: any split, or a sequence of records.
    config: `data.image_size`.
    batch_size: number of rows of every batch, the last one included.

  Yields:
    `image` uint8 `[batch_size, S, S, 3]`, `image_id` int32 `[batch_size]`
    and `mask` bool `[batch_size]`, which is False for the padding. An
    unreadable picture is named on stderr and stands as a black one, so that
    rows and records go on in step.
  """
  read = source.pair if isinstance(source, Source) else source.__getitem__
  load = functools.partial(_eval_row, source, read, config.data.image_size)
  dataset = (
    grain.MapDataset.range(len(source))
    .map(load)
    .batch(batch_size, batch_fn=functools.partial(_stack_padded, batch_size))
    .to_iter_dataset(_read_options())
  )
  with Batches(dataset) as batches:
    yield from batches


def decode_image(record_bytes: bytes, image_size: int) -> np.ndarray:
  """Returns a picture in the evaluation geometry, uint8 `[S, S, 3]`.

  Raises:
    transforms.UnreadableImage: if the bytes are no picture.
  """
  image = transforms.Decode()(record_bytes)
  return transforms.ResizeCenterCrop(image_size)(image)


def data_fingerprint(
  source: Source, tokenizer: Tokenizer, config: ConfigDict
) -> dict[str, Any]:
  """Returns what must be equal for a run to go on with the same batches."""
  recipe = _recipe(source, tokenizer, config)
  return {
    "source": source.fingerprint,
    "records": len(source),
    "seed": config.seed,
    "data_seed": config.data.seed,
    "batch_size": config.batch_size,
    "transforms": recipe.describe(),
    "tokenizer": tokenizer.sha256,
  }


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """How records become the rows of a training batch."""

  source: Source
  decode: transforms.Decode
  crop: transforms.RandomResizedCrop | transforms.ResizeCenterCrop
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
    """
    rng = np.random.Generator(np.random.Philox(seed))
    records = [self.source.pair(index) for index in indices]
    images, texts, image_ids = [], [], []
    for index, place, record in zip(indices, places, records, strict=True):
      record, image = self.usable(index, record)
      _go_to(rng, place)
      images.append(self.crop(image, rng))
      texts.append(self.pick(record["captions"], rng))
      image_ids.append(record["image_id"])
    text, text_len = self.tokenize(texts)
    return {
      "image": np.stack(images),
      "text": text,
      "text_len": text_len,
      "image_id": np.array(image_ids, np.int32),
    }

  def usable(self, index: int, record: Record) -> tuple[Record, Image.Image]:
    """Returns a record with a caption, and its picture.

    It is the given one, or else the next one that will do: which depends on
    the data alone, so that batches stay a function of their number.
    """
    size = len(self.source)
    for skips in range(min(size, _MAX_SKIPS)):
      at = (index + skips) % size
      record = self.source.pair(at) if skips else record
      captions = [caption for caption in record["captions"] if caption.strip()]
      try:
        if captions:
          image = self.decode(record["image"])
          return record | {"captions": captions}, image
        reason = "no caption"
      except transforms.UnreadableImage as e:
        reason = str(e)
      _skip(self.source, at, reason)
    raise UserError(
      f"{self.source.name}: {skips + 1} records in a row have no readable "
      f"picture and caption, the first of them {self.source.describe(index)}"
    )

  def describe(self) -> list[str]:
    """Returns the transforms as text."""
    return [repr(t) for t in (self.decode, self.crop, self.pick, self.tokenize)]


def _recipe(
  source: Source, tokenizer: Tokenizer, config: ConfigDict
) -> _Recipe:
  size = config.data.image_size
  scale = tuple(float(s) for s in config.data.crop_scale)
  if config.data.augment == "none":
    crop, smallest = transforms.ResizeCenterCrop(size), 1.0
  elif config.data.augment == "crop":
    crop, smallest = transforms.RandomResizedCrop(size, scale), scale[0]
  else:
    raise UserError(
      f"data.augment={config.data.augment!r} is unknown; it is none or crop"
    )
  # Twice the pixels that the crop needs leave the resize as good as exact
  # (only large JPEGs are concerned).
  min_side = int(np.ceil(2 * size / np.sqrt(max(smallest, 1e-2))))
  return _Recipe(
    source=source,
    decode=transforms.Decode(min_side),
    crop=crop,
    pick=transforms.PickCaption(),
    tokenize=transforms.Tokenize(config.tokenizer.max_len, tokenizer),
  )


class _HostBatches(grain.MapDataset):
  """A host's rows of the global batches."""

  def __init__(
    self,
    order: grain.MapDataset,
    recipe: _Recipe,
    seed: int,
    batch_size: int,
    rows: range,
  ):
    """Makes the data set.

    Args:
      order: indices of records, endless.
      recipe: makes a batch of them.
      seed: of the recipe's random numbers.
      batch_size: number of rows of the global batch.
      rows: those of this host.
    """
    super().__init__(order)
    self._recipe = recipe
    self._seed = seed
    self._batch_size = batch_size
    self._rows = rows

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    places = [index * self._batch_size + row for row in self._rows]
    indices = [self._parent[place] for place in places]
    return self._recipe.make(indices, places, self._seed)


def _go_to(rng: np.random.Generator, place: int) -> None:
  """Takes a Philox generator to the stream of a place; cheaper than a new one.

  The counter's last word is the place, its first counts the numbers drawn.
  """
  state = rng.bit_generator.state
  state["state"]["counter"] = np.array([0, 0, 0, place], np.uint64)
  state["buffer_pos"], state["has_uint32"] = 4, 0  # nothing is left over
  rng.bit_generator.state = state


def _eval_row(
  source: Source, read: Callable[[int], Record], size: int, index: int
) -> Batch:
  record = read(index)
  try:
    image = decode_image(record["image"], size)
  except transforms.UnreadableImage as e:
    _skip(source, index, str(e))
    image = np.zeros((size, size, 3), np.uint8)
  image_id = np.int32(record["image_id"])
  return {"image": image, "image_id": image_id, "mask": np.True_}


def _stack(rows: list[Batch]) -> Batch:
  """Stacks rows into arrays `[b, ...]`."""
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _stack_padded(batch_size: int, rows: list[Batch]) -> Batch:
  """Stacks rows, and adds rows of zeros up to `batch_size`."""
  batch = _stack(rows)
  missing = batch_size - len(rows)
  return {
    key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
    for key, value in batch.items()
  }


def _skip(source: Source, index: int, reason: str) -> None:
  warn_skipped(source.name, source.describe(index), reason)


def _read_options() -> grain.ReadOptions:
  cores = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1
  threads = min(cores, _MAX_THREADS)
  return grain.ReadOptions(threads, max(threads, _BUFFERED_BATCHES))


def _parse_no_flags() -> None:
  """Lets Grain's workers start outside `absl.app.run`: they read its flags."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
