"""Which steps are traced; a run that does it is in tests/e2e."""

import contextlib

import jax.numpy as jnp
import pytest

from vlp_jax import profiling
from vlp_jax.errors import UserError


class Recorder:
  """Stands for jax.profiler: what happened, in order."""

  def __init__(self, monkeypatch):
    self.events = []
    for name in ("start_trace", "stop_trace"):
      monkeypatch.setattr(
        profiling.jax.profiler, name, lambda *_, n=name: self.events.append(n)
      )

  @contextlib.contextmanager
  def pause(self, what):
    self.events.append(what)
    yield
    self.events.append("on")

  def step(self, x):
    self.events.append(int(x))
    return x


START = ["profiling", "start_trace", "on"]
STOP = ["profiling", "stop_trace", "on"]


@pytest.mark.parametrize(
  "steps, want",
  [
    ("", [7, 8, 9]),
    ("2:2", [7, *START, 8, *STOP, 9]),
    ("1:2", [*START, 7, 8, *STOP, 9]),
    ("3:9", [7, 8, *START, 9, *STOP]),  # the run ends first
    ("4:9", [7, 8, 9]),
  ],
)
def test_steps_are_traced(monkeypatch, capsys, tmp_path, steps, want):
  recorder = Recorder(monkeypatch)
  with profiling.Profiler(steps, tmp_path, recorder.pause) as profiler:
    for step in (7, 8, 9):
      assert profiler.run(step, recorder.step, jnp.int32(step)) == step
  assert recorder.events == want
  out = capsys.readouterr().out
  assert (f"xprof --logdir={tmp_path}" in out) == ("stop_trace" in want)


@pytest.mark.parametrize("steps", ["10", "5:3", "0:3", "a:b", "1:2:3"])
def test_what_is_no_range_is_refused(steps):
  with pytest.raises(UserError, match="must be FIRST:LAST"):
    profiling.parse(steps)
