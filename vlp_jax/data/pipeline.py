"""Batches of a source: for training, and every picture once for evaluation.

With `data.num_frames` = F > 0 a picture is a clip, and where `[S, S, 3]` is
said of it here it is `[F, S, S, 3]`: frames drawn in training, one of each of F
equal segments, and the middle ones of these in evaluation.

Training batch k is a function of (data config, seeds, k, host) alone: there
is no iterator state to save, a run goes on at `start_step`, and the global
batch is the same for any number of workers, threads and hosts. To that end
the data set stays random-access up to the batch:

  indices -> shuffle -> repeat (-> mix) -> a host's batches -> [start_step:]

Every epoch has its own order, in which each record comes exactly once;
batches run on across epochs, so a batch may be larger than the data set.
At its place in this endless order a picture is cropped and one of its captions
drawn, with random numbers that depend on the seed and the place. So is another
record, where one cannot be read.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vlp_jax.data import clips, transforms
from vlp_jax.data.recipe import Batch, Recipe, make_recipe
from vlp_jax.data.sources import Record, Source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.warn import warn_skipped
from vlp_jax.errors import UserError

# Whole batches are made ahead, one by each thread. Decoders leave the
# interpreter free, the rest does not: with more threads than cores, or more
# than these, they only get in one another's way.
_MAX_THREADS = 8
_BUFFERED_BATCHES = 4
_PICTURES = 64  # of a batch that no model sees
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")  # not on macOS
# So many rows tell a share of bad records from bad luck.
_MIN_ROWS = 1000


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


class TrainBatches(Batches):
  """Batches that count the records which had to be replaced.

  Attributes:
    bad_records: their number, of this host's, since step 0.
  """

  def __init__(
    self,
    dataset: grain.IterDataset,
    source: Source,
    max_bad: float,
    rows: int,
    bad_records: int,
  ):
    """Starts the threads.

    Args:
      dataset: batches with `bad`, a number.
      source: for messages.
      max_bad: the largest share of bad records.
      rows: that came before.
      bad_records: among these.
    """
    super().__init__(dataset)
    self.bad_records = bad_records
    self._name = source.name
    self._max_bad = max_bad
    self._rows = rows

  def __next__(self) -> Batch:
    batch = super().__next__()
    self.bad_records += int(batch.pop("bad"))
    self._rows += len(batch["image"])
    most = self._max_bad * self._rows
    if self._rows >= _MIN_ROWS and self.bad_records > most:
      raise UserError(
        f"{self._name}: {self.bad_records} of the {self._rows} records read so "
        "far had to be replaced, and were named above; mend the data, or allow "
        f"more than data.max_bad={self._max_bad} of them"
      )
    return batch


def train_batches(
  source: Source,
  tokenizer: Tokenizer,
  config: ConfigDict,
  *,
  start_step: int = 0,
  bad_records: int = 0,
  host: int | Sequence[int] = 0,
  num_hosts: int = 1,
) -> TrainBatches:
  """Returns the endless training batches from `start_step` on.

  Args:
    source: the training split.
    tokenizer: for the captions.
    config: `batch_size` (of all hosts), `seed`, `tokenizer.max_len` and
      `data.{seed, num_workers, max_bad}`, and what `make_recipe` reads. Both
      seeds matter: `seed` for the whole run, `data.seed` for the data alone.
    start_step: k of the first batch.
    bad_records: replaced before it.
    host: which block of rows of the global batch to return, or which blocks.
    num_hosts: number of blocks.

  Returns:
    An iterator of batches of b = batch_size / num_hosts rows for each block:
    `image` uint8 `[b, S, S, 3]`, `text` int32 `[b, L]`, `text_len` int32 `[b]`
    and `image_id` int32 `[b]`.

  Raises:
    UserError: if `batch_size` is not a multiple of `num_hosts`, or a field of
      `data` is wrong. The iterator raises one if no record is readable, or
      more than `data.max_bad` of at least a thousand are not; else these are
      replaced by others of their data set, drawn at random, and named on
      stderr.
  """
  if config.batch_size % num_hosts:
    raise UserError(
      f"batch_size={config.batch_size} is not a multiple of the {num_hosts} "
      "hosts; choose one that is"
    )
  size = config.batch_size // num_hosts
  blocks = [host] if isinstance(host, int) else host
  rows = [block * size + row for block in blocks for row in range(size)]
  seeds = np.random.SeedSequence(
    [config.seed % 2**32, config.data.seed % 2**32]
  )
  order_seed, visit_seed = seeds.generate_state(2).tolist()
  order = source.order(order_seed)
  recipe = make_recipe(source, tokenizer, config)
  dataset = _HostBatches(
    order, recipe, visit_seed, config.batch_size, rows
  ).slice(slice(start_step, None))
  workers = config.data.num_workers
  if workers:
    _parse_no_flags()
    dataset = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options)
  else:
    dataset = dataset.to_iter_dataset(_read_options())
  return TrainBatches(
    dataset, source, config.data.max_bad, start_step * len(rows), bad_records
  )


def eval_images(
  source: Source,
  config: ConfigDict,
  batch_size: int,
  *,
  shuffled: bool = False,
) -> Iterator[Batch]:
  """Yields every picture once, in the evaluation geometry.

  Row r of batch k is record `k * batch_size + r`, unless they are shuffled.

  Args:
    source: any split, or a sequence of records.
    config: `data.{image_size, eval_resize, num_frames}`.
    batch_size: number of rows of every batch, the last one included.
    shuffled: take the pictures in another order, the same every time.

  Yields:
    `image` uint8 `[batch_size, S, S, 3]`, `image_id` int32 `[batch_size]`
    and `mask` bool `[batch_size]`, which is False for the padding. An
    unreadable picture is named on stderr and stands as a black one, so that
    rows and records go on in step.
  """
  read = source.pair if isinstance(source, Source) else source.__getitem__
  transforms.eval_geometry(config.data)  # a mistake shows now, not in a thread
  load = functools.partial(_eval_row, source, read, config.data)
  indices = grain.MapDataset.range(len(source))
  dataset = (
    (indices.shuffle(seed=0) if shuffled else indices)
    .map(load)
    .batch(batch_size, batch_fn=functools.partial(_stack_padded, batch_size))
    .to_iter_dataset(_read_options())
  )
  with Batches(dataset) as batches:
    yield from batches


def pictures(source: Source, config: ConfigDict) -> Iterator[np.ndarray]:
  """Yields all pictures as evaluation sees them, uint8 `[b, S, S, 3]`.

  Shuffled, the same way every time: neighbours in a list are often alike. Of
  clips, each frame is a picture.
  """
  for batch in eval_images(source, config, _PICTURES, shuffled=True):
    image = batch["image"][batch["mask"]]
    yield image.reshape(-1, *image.shape[-3:])


def decode_image(
  record_bytes: bytes, geometry: transforms.Geometry
) -> np.ndarray:
  """Returns a picture in a geometry, uint8 `[S, S, 3]`.

  Raises:
    transforms.UnreadableImage: if the bytes are no picture.
  """
  return geometry(transforms.Decode()(record_bytes))


def eval_image(data: clips.Data, config: ConfigDict) -> np.ndarray:
  """Returns a record's picture as evaluation sees it, uint8 `[S, S, 3]`.

  Args:
    data: `image` of the record.
    config: `config.data`, with `image_size`, `eval_resize` and `num_frames`.

  Raises:
    transforms.UnreadableImage: if it is no picture, or clip.
  """
  geometry = transforms.eval_geometry(config)
  if not config.num_frames:
    return decode_image(data, geometry)
  frames = clips.DecodeClip(config.num_frames)(data)
  return np.stack([geometry(frame) for frame in frames])


def blank_image(config: ConfigDict) -> np.ndarray:
  """Returns what stands for a picture that cannot be read: a black one."""
  frames = (config.num_frames,) if config.num_frames else ()
  return np.zeros((*frames, config.image_size, config.image_size, 3), np.uint8)


def data_fingerprint(
  source: Source, tokenizer: Tokenizer, config: ConfigDict
) -> dict[str, Any]:
  """Returns what must be equal for a run to go on with the same batches."""
  recipe = make_recipe(source, tokenizer, config)
  return {
    "source": source.fingerprint,
    "records": len(source),
    "seed": config.seed,
    "data_seed": config.data.seed,
    "batch_size": config.batch_size,
    "transforms": recipe.describe(),
    "tokenizer": tokenizer.sha256,
  }


class _HostBatches(grain.MapDataset):
  """A host's rows of the global batches."""

  def __init__(
    self,
    order: grain.MapDataset,
    recipe: Recipe,
    seed: int,
    batch_size: int,
    rows: Sequence[int],
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


def _eval_row(
  source: Source,
  read: Callable[[int], Record],
  config: ConfigDict,
  index: int,
) -> Batch:
  record = read(index)
  try:
    image = eval_image(record["image"], config)
  except transforms.UnreadableImage as e:
    warn_skipped(source.name, source.describe(index), str(e))
    image = blank_image(config)
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


def _read_options() -> grain.ReadOptions:
  cores = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1
  threads = min(cores, _MAX_THREADS)
  return grain.ReadOptions(threads, max(threads, _BUFFERED_BATCHES))


def _parse_no_flags() -> None:
  """Lets Grain's workers start outside `absl.app.run`: they read its flags."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
