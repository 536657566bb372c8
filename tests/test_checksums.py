"""Checksums: of bits, wherever they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlp_jax import checksums, sharding


def _arrays():
  draw = np.random.default_rng(0)
  noise = jnp.asarray(draw.normal(size=(4, 8, 3)), jnp.float32)
  return {
    "noise": noise,
    "half": noise.astype(jnp.bfloat16),
    "bytes": jnp.arange(16, dtype=jnp.uint8),
    "signed": -jnp.arange(5),
    "truth": jnp.array([True, False]),
    "scalar": jnp.float32(-0.5),
    "empty": jnp.zeros((0, 3)),
    "key": jax.random.key(7),
  }


def test_by_hand():
  found = checksums.of_arrays({"a": jnp.array([[3, 5], [7, 9]], jnp.uint16)})
  weights = [(place * 0x9E3779B1 | 1) % 2**32 for place in range(4)]
  total = sum(x * w for x, w in zip((3, 5, 7, 9), weights, strict=True))
  assert found == {"a": total % 2**32}


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_the_same_wherever_arrays_are(monkeypatch, shape):
  arrays = _arrays()
  want = checksums.of_arrays(arrays)
  mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
  split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
  arrays["noise"] = jax.device_put(arrays["noise"], split)
  arrays["key"] = jax.device_put(
    arrays["key"], NamedSharding(mesh, PartitionSpec())
  )
  mixed = {name: arrays[name] for name in ("noise", "key")}
  assert checksums.of_arrays(mixed).items() <= want.items()
  monkeypatch.setattr(checksums, "_is_here", lambda _: False)
  assert checksums.of_arrays(mixed).items() <= want.items()
  if shape == (1, 1, 1):
    del arrays["noise"], arrays["key"]
    assert checksums.of_arrays(arrays).items() <= want.items()


def test_every_bit_counts():
  value = np.random.default_rng(1).normal(size=12).astype(np.float32)
  before = checksums.of_arrays({"x": jnp.asarray(value)})["x"]
  for place in range(12):
    for bit in range(32):
      bits = value.copy().view(np.uint32)
      bits[place] ^= np.uint32(1 << bit)
      array = jnp.asarray(bits.view(np.float32))
      assert checksums.of_arrays({"x": array})["x"] != before


def test_what_differs_is_named():
  arrays, meta = _arrays(), {"step": 3, "share": (0.1, 0.2)}
  saved = checksums.make(arrays, meta)
  meta["share"] = [0.1, 0.2]  # as JSON returns it
  assert checksums.differ(saved, arrays, meta) == []
  arrays["signed"] = arrays["signed"].at[2].add(1)
  del arrays["half"]
  assert checksums.differ(saved, arrays, meta) == ["signed"]
  assert checksums.differ(saved, arrays, {"step": 4}) == ["signed", "meta"]
