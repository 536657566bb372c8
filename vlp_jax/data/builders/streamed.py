"""A base for builders of large data sets that does without TensorFlow.

TFDS shuffles what it writes, and beyond 1 GB it does so with TensorFlow, or in
memory. Records are drawn at random when they are read; so here they are written
as they come, which also takes half the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters, utils

_SHARD_BYTES = 256 * 2**20


class StreamedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes what `_split_generators` gives in its order."""

  def _generate_splits(
    self, dl_manager: Any, download_config: Any
  ) -> list[tfds.core.SplitInfo]:
    """Overrides TFDS's; `_download_and_prepare` stores what it returns."""
    del download_config
    generators = self._split_generators(dl_manager)
    return [self._write(split, found) for split, found in generators.items()]

  def _write(
    self, split: str, examples: Iterable[tuple[Any, dict[str, Any]]]
  ) -> tfds.core.SplitInfo:
    """Writes the shards of a split; their number is in their final names."""
    adapter = file_adapters.ADAPTER_FOR_FORMAT[self.info.file_format]
    template = self._get_filename_template(split_name=split)
    records = self._records(split, examples)
    paths, lengths, num_bytes = [], [], 0
    while (first := next(records, None)) is not None:
      shard = _Shard(first, records)
      paths.append(template.data_dir / f"{split}-{len(paths):05d}.partial")
      adapter.write_examples(paths[-1], shard)
      lengths.append(shard.length)
      num_bytes += shard.num_bytes
    names = template.sharded_filepaths(len(paths))
    for path, name in zip(paths, names, strict=True):
      path.rename(name)
    return tfds.core.SplitInfo(
      name=split,
      shard_lengths=lengths,
      num_bytes=num_bytes,
      filename_template=template,
    )

  def _records(
    self, split: str, examples: Iterable[tuple[Any, dict[str, Any]]]
  ) -> Iterator[bytes]:
    features = self.info.features
    serializer = example_serializer.ExampleSerializer(
      features.get_serialized_info()
    )
    shown = utils.tqdm(examples, desc=split, unit=" examples", leave=False)
    for _, example in shown:
      yield serializer.serialize_example(features.encode_example(example))


class _Shard:
  """Iterates over the records of one shard, and counts them."""

  def __init__(self, first: bytes, rest: Iterator[bytes]):
    self._first, self._rest = first, rest
    self.length = self.num_bytes = 0

  def __iter__(self) -> Iterator[tuple[int, bytes]]:
    record: bytes | None = self._first
    while record is not None:
      self.length += 1
      self.num_bytes += len(record)
      yield self.length, record
      full = self.num_bytes >= _SHARD_BYTES
      record = None if full else next(self._rest, None)
