"""Writes shards in several processes; a finished shard is never made again.

A shard is written under a temporary name and renamed; then a `.json` beside it
tells what it holds, and that it is complete.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import multiprocessing
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensorflow_datasets.core import example_serializer, file_adapters
from tensorflow_datasets.proto import tf_example_pb2

from vlp_jax.data import intake
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.data.prepare.records import Schema
from vlp_jax.data.prepare.table import Shard, Table, merged

_POLL_SECONDS = 0.2


@dataclasses.dataclass
class Written:
  """A finished shard.

  Attributes:
    shard: which.
    path: of its file.
    num_bytes: of its records.
    tally: of its entries.
  """

  shard: Shard
  path: pathlib.Path
  num_bytes: int
  tally: Tally


def write_all(
  shards: Sequence[Shard],
  table: pathlib.Path,
  folder: pathlib.Path,
  schema: Schema,
  num_workers: int,
  on_progress: Callable[[int], None],
) -> Iterator[Written]:
  """Writes the shards that are not there yet, and yields all of them.

  Args:
    shards: of all splits.
    table: file of the entries.
    folder: where shards go.
    schema: of the records.
    num_workers: number of processes; with one, or one shard, it is this one.
    on_progress: called now and then with the number of entries done.

  Yields:
    Shards in the order in which they are finished.
  """
  todo, done = [], 0
  for shard in shards:
    written = _read_note(folder, shard)
    if written is None:
      todo.append(shard)
    else:
      done += shard.rows
      yield written
  job = functools.partial(_write, table=table, folder=folder, schema=schema)
  workers = min(num_workers, len(todo))
  if workers <= 1:
    for shard in todo:
      yield job(shard, lambda rows, before=done: on_progress(before + rows))
      done += shard.rows
    return
  with _pool(workers) as (pool, count):
    futures = {pool.submit(_in_worker, job, shard) for shard in todo}
    while futures:
      ended, futures = concurrent.futures.wait(
        futures, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
      )
      for future in ended:
        yield future.result()
      on_progress(done + count.value)


def _write(
  shard: Shard,
  count: Callable[[int], None],
  *,
  table: pathlib.Path,
  folder: pathlib.Path,
  schema: Schema,
) -> Written:
  """Writes a shard; `count` is told the number of entries so far."""
  tally = Tally()
  features = schema.features()
  serializer = example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  path = _path(folder, shard)
  partial = path.with_suffix(".partial")
  num_bytes = 0

  def serialized() -> Iterator[tuple[int, bytes]]:
    nonlocal num_bytes
    for key, record in examples(shard, table, schema, tally):
      example = features.encode_example(record)
      data = _ordered(serializer.serialize_example(example))
      num_bytes += len(data)
      yield key, data
      count(tally.written + tally.merged + tally.num_skipped)

  try:
    file_adapters.ArrayRecordFileAdapter.write_examples(partial, serialized())
  except RuntimeError as e:  # what the writer says when a disk is full
    if "No space left" not in str(e):
      raise
    raise OSError(errno.ENOSPC, "no space left", str(folder)) from e
  partial.rename(path)
  written = Written(shard, path, num_bytes, tally)
  _write_note(folder, written)
  return written


def examples(
  shard: Shard, table: pathlib.Path, schema: Schema, tally: Tally
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (hash, record) of a shard's entries that can be used.

  Args:
    shard: which.
    table: file of the entries.
    schema: of the records.
    tally: counts what is written, merged and skipped.
  """
  with Table(table) as entries:
    for key, entry in merged(entries.entries(shard), tally):
      try:
        record = schema.record(entry)
      except intake.Rejected as e:
        tally.skip(entry.name, e.reason)
      else:
        tally.written += 1
        yield key, record


def _ordered(data: bytes) -> bytes:
  """Returns an example with its features in order: equal ones, equal bytes."""
  example = tf_example_pb2.Example.FromString(data)
  return example.SerializeToString(deterministic=True)


def _path(folder: pathlib.Path, shard: Shard) -> pathlib.Path:
  return folder / f"{shard.split}-{shard.index:05d}.array_record"


def _write_note(folder: pathlib.Path, written: Written) -> None:
  note = {
    "shard": dataclasses.asdict(written.shard),
    "num_bytes": written.num_bytes,
    "file_bytes": written.path.stat().st_size,
    "tally": dataclasses.asdict(written.tally),
  }
  write_json(_path(folder, written.shard).with_suffix(".json"), note)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that is there when it is complete."""
  partial = path.with_suffix(".json.partial")
  partial.write_text(json.dumps(value))
  partial.rename(path)


def forget_skipping(shards: Sequence[Shard], folder: pathlib.Path) -> None:
  """Removes the finished shards that lack some of their entries."""
  for shard in shards:
    written = _read_note(folder, shard)
    if written is not None and written.tally.num_skipped:
      written.path.with_suffix(".json").unlink()
      written.path.unlink()


def _read_note(folder: pathlib.Path, shard: Shard) -> Written | None:
  path = _path(folder, shard)
  try:
    note = json.loads(path.with_suffix(".json").read_text())
    complete = path.stat().st_size == note["file_bytes"]
  except (OSError, ValueError):
    return None
  if not complete or note["shard"] != dataclasses.asdict(shard):
    return None
  return Written(shard, path, note["num_bytes"], Tally(**note["tally"]))


_count: Any = None  # of entries that all workers have done


@contextlib.contextmanager
def _pool(
  workers: int,
) -> Iterator[tuple[concurrent.futures.Executor, Any]]:
  context = multiprocessing.get_context("spawn")
  count = context.Value("q", 0)
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, context, _start_worker, (count,)
  )
  try:
    yield pool, count
  finally:  # after an error, shards that are under way are still finished
    pool.shutdown(cancel_futures=True)


def _start_worker(count: Any) -> None:
  global _count
  _count = count
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _in_worker(job: Callable[..., Written], shard: Shard) -> Written:
  told = 0

  def count(rows: int) -> None:
    nonlocal told
    with _count.get_lock():
      _count.value += rows - told
    told = rows

  return job(shard, count)
