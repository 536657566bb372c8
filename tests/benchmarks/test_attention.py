"""What the benchmark of attention compares computes the same."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import attention
from tests import toys
from vlp_jax.ops.masks import Mask


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_agree(causal):
  shape = (4, 1, 5, 2, attention.CHANNELS)
  made = jax.random.normal(jax.random.key(0), shape)
  mask = Mask(causal=causal)
  call = functools.partial(pl.pallas_call, interpret=True)
  with mock.patch.object(pl, "pallas_call", call):
    want, *others = (
      toys.jit(attention.gradients(kernel, mask))(*made)
      for kernel in ("xla", "tpu", "flash")
    )
  for other in others:
    for x, y in zip(other, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_device_without_kernels_is_compared_with_itself(monkeypatch):
  monkeypatch.setitem(attention.SHAPES, "small", (1, 3, 2, False))
  assert attention.ratios("small", 1) == {"xla": 1.0}
