"""Joint training on pictures and clips: streams of batches, in turn.

A run has one stream, of `config.data`; where `config.clips.share` > 0, that
share of its steps is on clips, which are a stream of their own, with batches
of another shape. Whose turn it is, and which batch of that stream comes, is a
function of the step (`turns.py`); so a run can go on at any.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.data import pipeline
from vlp_jax.data.mixture import Mixture, open_training
from vlp_jax.data.recipe import Batch
from vlp_jax.data.sources import Source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.turns import Turns
from vlp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stream:
  """Batches of one shape.

  Attributes:
    name: what its metrics begin with.
    share: of the steps.
    config: the run's, where `data` and `batch_size` are the stream's.
    source: its training split.
  """

  name: str
  share: float
  config: ConfigDict
  source: Source


def has_clips(config: ConfigDict) -> bool:
  """Tells whether `config.clips` names data, for training or evaluation."""
  return bool(config.clips.name or config.clips.source)


def of_clips(config: ConfigDict) -> ConfigDict:
  """Returns a config whose `data` and `batch_size` are those of the clips."""
  found, clips = config.copy_and_resolve_references(), config.clips
  found.batch_size = clips.batch_size or config.batch_size
  found.data.update(
    name=clips.name,
    source=clips.source,
    mix="",
    num_frames=clips.num_frames,
    image_size=clips.image_size or config.data.image_size,
  )
  return found


def configs(config: ConfigDict) -> list[tuple[str, float, ConfigDict]]:
  """Returns the name, the share and the config of each stream, checked.

  Raises:
    UserError: if `config.clips` cannot be.
  """
  clips = config.clips
  if not clips.share:
    return [("train", 1.0, config)]
  problem = None
  if clips.share >= 1:
    problem = (
      f"share={clips.share} leaves no step for pictures; to train on clips "
      "alone, set config.data.num_frames"
    )
  elif not has_clips(config):
    problem = f"share={clips.share} needs data: set its name or source"
  elif clips.num_frames < 1:
    problem = f"num_frames={clips.num_frames} must be at least 1"
  elif config.data.num_frames:
    problem = (
      f"share={clips.share} is for runs whose config.data are pictures: set "
      "config.data.num_frames=0"
    )
  elif not config.total_steps:
    problem = (
      f"share={clips.share} makes no epochs: give the run's length as "
      "config.total_steps"
    )
  if problem:
    raise UserError(f"config.clips.{problem}")
  return [
    ("train", 1 - clips.share, config),
    ("train_clips", clips.share, of_clips(config)),
  ]


def open_streams(
  parts: Sequence[tuple[str, float, ConfigDict]],
) -> list[Stream]:
  """Opens what a run trains on.

  Args:
    parts: of `configs`.

  Raises:
    UserError: as `open_training`.
  """
  return [
    Stream(name, share, one, open_training(one.data))
    for name, share, one in parts
  ]


def union(streams: Sequence[Stream]) -> Source:
  """Returns all records as one source, for the tokenizer."""
  if len(streams) == 1:
    return streams[0].source
  sources = [stream.source for stream in streams]
  return Mixture(sources, [s.share for s in streams], sources[0].split)


def examples_a_step(streams: Sequence[Stream]) -> float:
  """Returns the mean size of batches."""
  return sum(stream.share * stream.config.batch_size for stream in streams)


def fingerprint(
  streams: Sequence[Stream], tokenizer: Tokenizer
) -> dict[str, Any]:
  """Returns what must be equal for a run to go on with the same batches."""
  first, *others = streams
  found = pipeline.data_fingerprint(first.source, tokenizer, first.config)
  for stream in others:
    own = pipeline.data_fingerprint(stream.source, tokenizer, stream.config)
    own["share"] = stream.share
    found |= {f"{stream.name}_{name}": value for name, value in own.items()}
  return found


class JointBatches(Iterator[tuple[int, Batch]]):
  """Endless training batches, each with the number of its stream."""

  def __init__(
    self,
    streams: Sequence[Stream],
    tokenizer: Tokenizer,
    *,
    start_step: int,
    bad_records: dict[str, int],
    host: int | Sequence[int],
    num_hosts: int,
  ):
    """Starts the threads.

    Args:
      streams: in turn.
      tokenizer: for the captions.
      start_step: of the run.
      bad_records: before it, by the stream's name.
      host: which block of rows of the global batches to return, or which.
      num_hosts: number of blocks.
    """
    self._names = [stream.name for stream in streams]
    self._turns = Turns([stream.share for stream in streams])
    self._step = start_step
    # However many could be started, none is left running.
    with contextlib.ExitStack() as stack:
      self._batches = [
        stack.enter_context(
          pipeline.train_batches(
            stream.source,
            tokenizer,
            stream.config,
            start_step=start,
            bad_records=bad_records.get(stream.name, 0),
            host=host,
            num_hosts=num_hosts,
          )
        )
        for stream, start in zip(
          streams, self._turns.before(start_step), strict=True
        )
      ]
      self._closer = stack.pop_all()

  def __next__(self) -> tuple[int, Batch]:
    number, _ = self._turns(self._step)
    self._step += 1
    return number, next(self._batches[number])

  @property
  def bad_records(self) -> dict[str, int]:
    """Records that had to be replaced since step 0, of each stream."""
    found = zip(self._names, self._batches, strict=True)
    return {name: batches.bad_records for name, batches in found}

  def close(self) -> None:
    """Ends the threads and worker processes; a second time does nothing."""
    self._closer.close()
