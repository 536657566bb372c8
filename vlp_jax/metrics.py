"""What a run leaves to read: metrics, events, progress, results, a table.

Only process 0 writes and prints; the others may call the same functions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vlp_jax.errors import UserError
from vlp_jax.throughput import Throughput, process_age


class Writer:
  """Appends to `metrics.jsonl`, and to TensorBoard events beside it.

  A line is an object with `step` and flat names: numbers, or null for what is
  not finite. The file of a run that was killed and resumed equals that of one
  that was not, apart from the names under `time/`.
  """

  def __init__(self, workdir: str | os.PathLike, start: int = 0):
    """Opens the files, and drops what a killed run wrote too much.

    Args:
      workdir: the run's folder.
      start: the step to go on from; later lines will be written again.

    Raises:
      UserError: if the folder cannot be written.
    """
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._file = self._events = None
    if jax.process_index() != 0:
      return
    # It would warn of every number that is not finite.
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)
    with _explained(self._path):
      _truncate(self._path, start)
      # Without a buffer: a line is there, or told to be missing, at once.
      self._file = self._path.open("ab", buffering=0)
      # Not its SummaryWriter: that one's thread dies where a disk is full, and
      # who writes next waits for it, for ever.
      self._events = EventsWriter(str(self._path.with_name("events")))
      purge = SessionLog(status=SessionLog.START)
      self._add(Event(step=start + 1, session_log=purge))

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics of a step at once.

    Args:
      step: finished updates.
      metrics: scalars, by flat name.

    Raises:
      UserError: if the disk is full.
    """
    if self._file is None:
      return
    values = {name: float(value) for name, value in metrics.items()}
    line = {"step": step} | {
      name: value if math.isfinite(value) else None
      for name, value in values.items()
    }
    with _explained(self._path):
      self._file.write(json.dumps(line).encode() + b"\n")
      for name, value in values.items():
        self._add(Event(step=step, summary=summary.scalar(name, value)))
      self._events.flush()

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    self._events.write_event(event)

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
      with _explained(self._path):
        self._events.close()


def _truncate(path: pathlib.Path, start: int) -> None:
  """Keeps the lines up to a step; a line that was cut in the middle goes."""
  kept = []
  if path.exists():
    for line in path.read_text().splitlines(keepends=True):
      try:
        whole = line.endswith("\n") and json.loads(line)["step"] <= start
      except (KeyError, TypeError, ValueError):
        whole = False
      if whole:
        kept.append(line)
  _write_whole(path, "".join(kept))


class Progress:
  """Shows how a run goes: a bar on a terminal, else a line now and then.

  Use it as a context. Steps, examples/s, the loss and the time left.

  Args:
    total_steps: of the whole run.
    batch_size: examples of a step, on average.
    start: steps that were done before.
    interval: seconds between lines, where there is no terminal.
    **work: `model_flops` and `peak_flops` of `Throughput`.
  """

  def __init__(
    self,
    total_steps: int,
    batch_size: float,
    start: int = 0,
    interval: float = 5.0,
    **work: Any,
  ):
    self._total_steps = total_steps
    self._batch_size = batch_size
    self._interval = interval
    self._printed = -math.inf
    self._throughput = Throughput(batch_size, age=process_age(), **work)
    self._bar = None
    if jax.process_index() == 0 and sys.stdout.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
      )
      self._task = self._bar.add_task(
        "training", total=total_steps, completed=start, text=""
      )

  def __enter__(self) -> Progress:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, loss: float) -> None:
    """Tells that a step is finished."""
    self._throughput.step()
    if jax.process_index() != 0:
      return
    if self._bar is not None:
      text = self._text(step, loss)
      self._bar.update(self._task, completed=step, text=text)
      return
    now = time.monotonic()
    if now - self._printed >= self._interval or step == self._total_steps:
      self._printed = now
      print(self._text(step, loss), flush=True)

  def waiting(self):
    """A context for waiting for data."""
    return self._throughput.waiting()

  @contextmanager
  def pause(self, what: str) -> Iterator[None]:
    """A context for what is no training; it is shown, and not timed."""
    if self._bar is not None:
      self._bar.update(self._task, description=what)
    with self._throughput.paused(what):
      yield
    if self._bar is not None:
      self._bar.update(self._task, description="training")

  def rates(self) -> dict[str, float]:
    """See `Throughput.rates`."""
    return self._throughput.rates()

  def _text(self, step: int, loss: float) -> str:
    text = f"step {step:,}/{self._total_steps:,}  loss {loss:.3f}"
    seconds = self._throughput.seconds_per_step()
    if not seconds:
      return text
    left = round(seconds * (self._total_steps - step))
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return f"{text}  {self._batch_size / seconds:,.0f} examples/s  {clock} left"


def params_sha256(params: Any) -> str:
  """Hashes parameters: sorted paths, dtypes, shapes and bytes.

  It does not depend on how they are sharded, nor on the order of dicts. Every
  process calls it.
  """
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  digest = hashlib.sha256()
  for name, leaf in sorted(named.items()):  # leaf by leaf, for memory
    if getattr(leaf, "is_fully_addressable", True):
      value = np.asarray(leaf)
    else:
      value = multihost_utils.process_allgather(leaf, tiled=True)
    digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def write_results(
  workdir: str | os.PathLike,
  *,
  config: ConfigDict,
  step: int,
  params_sha256: str,
  seconds: float,
  metrics: Mapping[str, float],
) -> None:
  """Writes `results.json`, whole or not at all.

  One object with `config`, `step`, `params_sha256`, `seconds` and `metrics`,
  the last by flat name; what is not finite becomes null.

  Args:
    workdir: the run's folder.
    config: of the run.
    step: finished updates.
    params_sha256: of the final parameters.
    seconds: of the whole run, over all its processes.
    metrics: the final metrics.

  Raises:
    UserError: if it cannot be written.
  """
  if jax.process_index() != 0:
    return
  results = {
    "config": json.loads(config.to_json()),
    "step": step,
    "params_sha256": params_sha256,
    "seconds": seconds,
    "metrics": {
      name: float(value) if math.isfinite(value) else None
      for name, value in sorted(metrics.items())
    },
  }
  path = pathlib.Path(workdir) / "results.json"
  with _explained(path):
    _write_whole(path, json.dumps(results, indent=2) + "\n")


def print_table(metrics: Mapping[str, float]) -> None:
  """Prints metrics, each beside its chance level (`<name>_chance`) if known.

  Names are grouped by what stands before the last slash.
  """
  if jax.process_index() != 0 or not metrics:
    return
  table = rich.table.Table("metric", box=rich.box.SIMPLE_HEAD)
  table.add_column("value", justify="right")
  table.add_column("chance", justify="right")
  group = None
  for name in sorted(metrics, key=lambda name: name.rpartition("/")[0]):
    if name.endswith("_chance") and name.removesuffix("_chance") in metrics:
      continue
    section = name.rpartition("/")[0]
    if group is not None and section != group:
      table.add_section()
    group = section
    chance = metrics.get(f"{name}_chance")
    table.add_row(
      name,
      f"{metrics[name]:.3f}",
      "" if chance is None else f"{chance:.3f}",
    )
  rich.console.Console().print(table)


def _write_whole(path: pathlib.Path, text: str) -> None:
  partial = path.with_suffix(".partial")
  partial.write_text(text)
  partial.replace(path)


@contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"cannot write {path} ({error.strerror}); mend that, or choose another "
      "--workdir, and start again"
    ) from error
