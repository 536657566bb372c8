"""A profile of some steps, for XProf or TensorBoard."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from vlp_jax.errors import UserError


def parse(steps: str) -> tuple[int, int]:
  """Reads `config.profile`.

  Args:
    steps: `FIRST:LAST`, both included, or empty.

  Returns:
    Both; zeros where it is empty.

  Raises:
    UserError: if it is neither.
  """
  if not steps:
    return 0, 0
  found = re.fullmatch(r"(\d+):(\d+)", steps)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise UserError(
      f"config.profile is {steps!r}, but must be FIRST:LAST, as in 10:15: "
      "steps, counted from 1 when the process begins"
    )
  return first, last


class Profiler:
  """Calls steps, and traces those that were asked for. Use it as a context.

  Args:
    steps: see `parse`; counted from 1 when the process begins.
    folder: gets the trace.
    pause: makes a context for what is no training, of its name.

  Raises:
    UserError: as `parse`.
  """

  def __init__(
    self,
    steps: str,
    folder: str | os.PathLike,
    pause: Callable[[str], AbstractContextManager],
  ):
    self._first, self._last = parse(steps)
    self._folder = os.fspath(folder)
    self._pause = pause
    self._done = 0
    self._tracing = False

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def run(self, step: int, function: Callable, *args: Any) -> Any:
    """Returns `function(*args)`, with the name of a step in the trace.

    After the last step it waits for the devices.

    Args:
      step: its number in the run.
      function: the step.
      *args: what it takes.
    """
    self._done += 1
    if self._done == self._first:
      with self._pause("profiling"):
        jax.profiler.start_trace(self._folder)
      self._tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      out = function(*args)
    if self._done == self._last:
      jax.block_until_ready(out)
      self._stop()
    return out

  def _stop(self) -> None:
    if not self._tracing:
      return
    self._tracing = False
    with self._pause("profiling"):
      jax.profiler.stop_trace()
    if jax.process_index() == 0:
      print(
        f"profile in {self._folder}; to see it: pip install xprof && "
        f"xprof --logdir={self._folder}"
      )
