"""The releases' calls: the same losses as ours, and as many as they make."""

import collections

import jax
import numpy as np
import pytest

from benchmarks import method_cost
from benchmarks.scl_release_calls import SclReleaseCalls
from benchmarks.simla_release_calls import SimlaReleaseCalls
from tests import toys

SMALL = "model.fusion.depth=1"
GLSCL = ("method.patch_weight=0.2", "method.token_weight=0.2")
BASELINE = ("method.vision_weight=0", "method.language_weight=0")


def batch(frames=0):
  found = toys.batch(8)
  if frames:
    shape = (8, frames, toys.IMAGE, toys.IMAGE, 3)
    draw = np.random.default_rng(1)
    found["image"] = draw.integers(0, 256, shape, dtype=np.uint8)
  return found


def assert_equal(ours, calls, params, data, ctx):
  got, want = (
    toys.jit(method_cost.losses(method))(params, data, ctx)[1]
    for method in (ours, method_cost.with_calls(calls, ours))
  )
  assert got.keys() == want.keys()
  for name, value in got.items():
    np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ("overrides", "frames"),
  [
    (GLSCL, 0),
    pytest.param(GLSCL, 2, marks=pytest.mark.slow),
    pytest.param(BASELINE, 0, marks=pytest.mark.slow),
  ],
)
def test_scl_equals_its_release(overrides, frames):
  overrides = ("scl", SMALL, *overrides)
  method, params = toys.method(*overrides), toys.params(*overrides)
  data, ctx = batch(frames), toys.context()
  assert_equal(method, SclReleaseCalls, params, data, ctx)


@pytest.mark.slow
def test_simla_equals_its_release():
  method, params = toys.method("simla"), toys.params("simla")
  ctx = toys.context(
    step=8,
    method_state=toys.method_state("simla"),
    ema_params=toys.params("simla", seed=1),
  )
  assert_equal(method, SimlaReleaseCalls, params, batch(), ctx)


def counted(calls, overrides):
  """Rows that each part of the module is given, in units of the batch."""
  found = collections.Counter()
  overrides = ("scl", SMALL, *overrides)
  method, data = toys.method(*overrides), batch()

  class Counted(calls or type(method)):
    def apply(self, params, name, *args, **kwargs):
      if args:
        rows = len(jax.tree.leaves(args)[0])
        found[name] += rows // len(data["text"])
      return super().apply(params, name, *args, **kwargs)

  method = method_cost.with_calls(Counted, method)
  params = toys.shapes(*overrides)
  jax.eval_shape(method_cost.losses(method), params, data, toys.context())
  texts = found["read"] + found["encode_text"]
  return texts, found["see"] + found["encode_image"], found["fuse"]


@pytest.mark.parametrize(
  ("overrides", "ours", "release"),
  [
    # Texts, pictures, fusions; the short ones included.
    ((), (3, 2, 4), (5, 5, 4)),
    (BASELINE, (2, 1, 2), (3, 3, 2)),
    pytest.param(GLSCL, (3, 3, 5), (6, 6, 5), marks=pytest.mark.slow),
  ],
)
def test_calls_of_scl(overrides, ours, release):
  assert counted(None, overrides) == ours
  assert counted(SclReleaseCalls, overrides) == release
