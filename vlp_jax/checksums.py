"""Checksums of arrays and of JSON, to tell a flipped bit on the disk."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio


def make(
  arrays: Mapping[str, jax.Array], meta: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the checksums of a checkpoint, as JSON can hold them.

  Args:
    arrays: see `of_arrays`.
    meta: see `of_json`.
  """
  return {"arrays": of_arrays(arrays), "meta": of_json(meta)}


def differ(
  saved: Mapping[str, Any],
  arrays: Mapping[str, jax.Array],
  meta: Mapping[str, Any],
) -> list[str]:
  """Returns the names of what is not as it was, `meta` being one.

  Args:
    saved: of `make`.
    arrays: some of those that were saved.
    meta: what was saved.
  """
  found = of_arrays(arrays)
  wrong = [name for name in found if found[name] != saved["arrays"][name]]
  return wrong + ["meta"] * (of_json(meta) != saved["meta"])


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns 32 bits for each array; every process calls it.

  A number that changes alone changes them; of other changes one in 2^32 does
  not. They are sums of integers: equal however the arrays are sharded, and
  wherever they are. On accelerators they are computed there.

  Args:
    arrays: by name, of any type, keys included.
  """
  values = [_plain(array) for array in arrays.values()]
  if all(map(_is_here, values)):  # a compiler would take longer
    sums = [_sum(np, np.asarray(x).view(_kind(x))) for x in values]
  else:
    meshes = (getattr(x.sharding, "mesh", None) for x in values)
    mesh = next(filter(None, meshes), None)
    replicated = mesh and NamedSharding(mesh, PartitionSpec())
    sums = jax.jit(_sums, out_shardings=replicated)(values)
  return dict(zip(arrays, map(int, np.asarray(sums)), strict=True))


def of_json(value: Any) -> int:
  """Returns 32 bits for what JSON can hold, equal after a round trip."""
  text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
  return zlib.crc32(text.encode())


def _plain(array: jax.Array) -> jax.Array:
  """Makes numbers of keys and truth values."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(array)
  return array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array


def _kind(array: jax.Array) -> np.dtype:
  return np.dtype(f"uint{8 * array.dtype.itemsize}")


def _is_here(array: jax.Array) -> bool:
  on_host = all(device.platform == "cpu" for device in array.devices())
  return on_host and array.is_fully_addressable


def _sums(arrays: list[jax.Array]) -> jax.Array:
  bits = [jax.lax.bitcast_convert_type(x, _kind(x)) for x in arrays]
  return jnp.stack([_sum(jnp, x) for x in bits])


def _sum(xp: Any, bits: Any) -> Any:
  """Sums unsigned numbers, each times an odd weight of its own.

  Args:
    xp: numpy or jax.numpy.
    bits: an array of it, of any shape.
  """
  place = xp.zeros((1,) * bits.ndim, np.uint32)
  for axis, size in enumerate(bits.shape):
    shape = [1] * bits.ndim
    shape[axis] = size
    index = xp.arange(size, dtype=np.uint32).reshape(shape)
    place = place * np.uint32(size) + index
  weights = place * np.uint32(_GOLDEN) | np.uint32(1)
  return xp.sum(bits.astype(np.uint32) * weights, dtype=np.uint32)
