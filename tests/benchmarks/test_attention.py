"""What the benchmark of attention compares computes the same."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import attention
from tests import toys
from vlp_jax.ops import platforms


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_agree(causal):
  shape = attention.Shape(1, 5, 2, causal)
  made = jax.random.normal(jax.random.key(0), (4, 1, 5, 2, attention.CHANNELS))
  call = functools.partial(pl.pallas_call, interpret=True)
  with mock.patch.object(pl, "pallas_call", call):
    want, *others = (
      toys.jit(attention.gradients(kernel, shape))(*made)
      for kernel in ("xla", "tpu", "flash")
    )
  for other in others:
    for x, y in zip(other, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_dropped():
  shape = attention.Shape(1, 5, 2, dropout=0.5)
  made = jax.random.normal(jax.random.key(0), (4, 1, 5, 2, attention.CHANNELS))
  assert attention.kernels_for(shape) == ("tpu",)
  call = functools.partial(pl.pallas_call, interpret=True)
  with mock.patch.object(pl, "pallas_call", call):
    for kernel in ("xla", "tpu"):
      all_kept, dropped = (
        toys.jit(attention.gradients(kernel, x))(*made)
        for x in (shape._replace(dropout=0.0), shape)
      )
      assert np.abs(all_kept[0] - dropped[0]).max() > 0.1


def test_a_device_without_kernels_is_compared_with_itself(monkeypatch):
  monkeypatch.setitem(attention.SHAPES, "small", attention.Shape(1, 3, 2))
  assert attention.ratios("small", 1) == {"xla": 1.0}


def test_a_stack_is_traced_for_the_chip_it_is_compiled_for(monkeypatch):
  """Some of a step is written in another way for TPUs (`ops/linear.py`)."""
  seen = []

  class Spy(attention.Transformer):
    def __call__(self, *args):
      seen.append(platforms.platform())
      return super().__call__(*args)

  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  monkeypatch.setattr(attention, "on_v5e", lambda: here)
  monkeypatch.setattr(attention, "Transformer", Spy)
  monkeypatch.setitem(attention.SHAPES, "small", attention.Shape(1, 3, 2))
  assert attention.stack("xla", "small")["temp_MiB"] > 0
  assert seen[-1] == "tpu"
