"""How fast a run goes, and what its time is spent on."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAVING = "saving"  # the pause that is counted as a stall


class Throughput:
  """Measures a loop's speed, leaving pauses and the first step out.

  Args:
    batch_size: examples of a step, on average.
    model_flops: returns the operations of a step, on average; called when they
      are first told, in a pause: counting takes seconds.
    peak_flops: operations a second of all devices; None if that is not known.
    clock: seconds.
    age: seconds since the process began.
  """

  def __init__(
    self,
    batch_size: float,
    model_flops: Callable[[], float] = lambda: 0.0,
    peak_flops: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    age: float = 0.0,
  ):
    self._batch_size = batch_size
    self._model_flops = model_flops
    self._peak_flops = peak_flops
    self._clock = clock
    self._begun = None  # when the first step, which compiles, was done
    self._window = [0, 0.0, 0.0]  # steps, seconds, seconds spent waiting
    self._total = [0, 0.0]  # steps, seconds
    self._told = clock()  # when rates were last told
    self._stalled = 0.0  # seconds since then
    self._started = self._told - age  # of the process
    self._restart = None  # seconds, until they are told

  def step(self) -> None:
    """Counts a finished step."""
    now = self._clock()
    if self._begun is not None:
      seconds = now - self._begun
      self._window[0] += 1
      self._window[1] += seconds
      self._total[0] += 1
      self._total[1] += seconds
    else:
      self._window[2] = 0.0
      self._restart = now - self._started
    self._begun = now

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts its body's time as waiting for data."""
    begun = self._clock()
    yield
    self._window[2] += self._clock() - begun

  @contextmanager
  def paused(self, what: str = "") -> Iterator[None]:
    """Does not count its body's time: evaluations, checkpoints."""
    begun = self._clock()
    yield
    seconds = self._clock() - begun
    if self._begun is not None:
      self._begun += seconds
    if what == SAVING:
      self._stalled += seconds

  def seconds_per_step(self) -> float | None:
    """Returns the mean since the second step, or None before its end."""
    steps, seconds = self._total
    return seconds / steps if steps else None

  @functools.cached_property
  def _work(self) -> float:
    with self.paused():
      return self._model_flops()

  def rates(self) -> dict[str, float]:
    """Returns the rates since the last call, by the names of docs/metrics.md.

    None where no step was timed, but for `time/restart_seconds`, which is told
    once.
    """
    found = {}
    if self._restart is not None:
      found["time/restart_seconds"] = self._restart
      self._restart = None
    steps, seconds, waited = self._window
    if not steps or seconds <= 0:
      return found
    now, speed, work = self._clock(), steps / seconds, self._work
    found |= {
      "time/examples_per_second": speed * self._batch_size,
      "time/model_tflops_per_second": speed * work / 1e12,
      "time/data_wait": min(waited / seconds, 1.0),
      "time/checkpoint_stall": self._stalled / (now - self._told),
      "time/goodput": self._total[1] / (now - self._started),
    }
    if self._peak_flops:
      found["time/mfu"] = speed * work / self._peak_flops
    self._window = [0, 0.0, 0.0]
    self._told, self._stalled = now, 0.0
    return found


def process_age() -> float:
  """Returns the seconds since this process began; 0 where nobody knows."""
  try:
    with open("/proc/self/stat", "rb") as file:
      # After the name in brackets, which may hold anything: the 20th field.
      ticks = int(file.read().rpartition(b")")[2].split()[19])
    begun = ticks / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - begun, 0.0)
  except (OSError, AttributeError):  # another system
    return 0.0
