"""The rows of a batch, some at a time on every device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec


class Rows(NamedTuple):
  """How many rows of a batch are worked on at a time.

  Attributes:
    chunk: on each device, at most; 0 takes all at once.
    sharding: of the batch, whose first dimension is cut; None is one device.
  """

  chunk: int = 0
  sharding: NamedSharding | None = None


ALL = Rows()


def devices(sharding: NamedSharding | None) -> int:
  """How many devices the first dimension is cut over."""
  if sharding is None or not sharding.spec or sharding.spec[0] is None:
    return 1
  axes = sharding.spec[0]
  axes = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(sharding.mesh.shape[axis] for axis in axes)


def split(
  x: jax.Array, count: int, sharding: NamedSharding | None
) -> jax.Array:
  """Cuts `[B, ...]` into `[count, B / count, ...]` without moving rows.

  Every device holds a block of consecutive rows; each chunk takes an equal
  part of every block.

  Args:
    x: `[B, ...]`.
    count: number of chunks; `count` times the devices divides B.
    sharding: of the batch.
  """
  rest = x.shape[1:]
  x = x.reshape(devices(sharding), count, -1, *rest).swapaxes(0, 1)
  x = x.reshape(count, -1, *rest)
  if sharding is None:
    return x
  spec = PartitionSpec(None, *sharding.spec)
  spec = NamedSharding(sharding.mesh, spec)
  return jax.lax.with_sharding_constraint(x, spec)


def merge(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
  """Puts what `split` made back into its order: `[B, ...]`."""
  count, rest = x.shape[0], x.shape[2:]
  x = x.reshape(count, devices(sharding), -1, *rest).swapaxes(0, 1)
  x = x.reshape(-1, *rest)
  if sharding is None:
    return x
  return jax.lax.with_sharding_constraint(x, sharding)


def map_rows(function: Callable, arrays: Any, rows: Rows) -> Any:
  """Applies a function to the rows of arrays, and joins what it returns.

  Each device works through its own rows, so none move. What the function makes
  on the way exists for one chunk at a time, in the backward pass as well, where
  it is made again.

  Args:
    function: maps a pytree of arrays `[b, ...]` to one of arrays `[b, ...]`,
      each row by itself.
    arrays: a pytree of `[B, ...]`; the devices divide B.
    rows: how they are cut.
  """
  size = jax.tree.leaves(arrays)[0].shape[0] // devices(rows.sharding)
  if not rows.chunk or rows.chunk >= size:
    return function(arrays)
  # The fewest equal parts that are small enough.
  fewest = -(-size // rows.chunk)
  count = next(k for k in range(fewest, size + 1) if size % k == 0)
  parts = jax.tree.map(lambda x: split(x, count, rows.sharding), arrays)
  parts = jax.lax.map(jax.checkpoint(function), parts)
  return jax.tree.map(lambda x: merge(x, rows.sharding), parts)
