"""Where arrays live: the mesh, one table of rules, and shardings for trees.

Modules name no mesh axes. A parameter's sharding follows from the end of its
path; optimizer moments and averages have the same ends, so they follow too.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlp_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Below this many numbers, an array costs less to copy than to gather.
MIN_SIZE = 2**14

# The end of a path, and the axes of the array's last dimensions. N heads, H
# channels a head, D the residual stream, M the MLP, V the vocabulary.
RULES = (
  (r"self_attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # D 3 N H
  (r"cross_attention/kv/kernel", ("fsdp", None, "tensor", None)),  # D 2 N H
  (r"/[qkv]/kernel", ("fsdp", "tensor", None)),  # D N H
  (r"out/(proj/)?kernel", ("tensor", None, "fsdp")),  # N H D
  (r"up/kernel", ("fsdp", "tensor")),  # D M
  (r"down/kernel", ("tensor", "fsdp")),  # M D
  (r"embedding/embedding", ("tensor", "fsdp")),  # V D
  (r"vocabulary/kernel", ("fsdp", "tensor")),  # D V
  (r"_queue", ("fsdp", None)),  # Q E
)


def make_mesh(shape: tuple[int, int, int], devices=None) -> Mesh:
  """Makes the mesh of `AXES`; its product is the number of devices.

  Neighbours in a mesh are neighbours in a slice of TPUs, as far as its torus
  lets them be. Several slices, or nodes of GPUs, lie along `data`, which has
  least to send.

  Raises:
    UserError: if several slices of TPUs cannot lie along `data`.
  """
  devices = jax.devices() if devices is None else devices
  grid = arrange(shape, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices of a mesh, see `make_mesh`."""
  count = len({getattr(device, "slice_index", 0) for device in devices})
  data, *others = shape
  if count > 1 and data % count == 0:
    return mesh_utils.create_hybrid_device_mesh(
      (data // count, *others),
      (count, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  if count > 1 and devices[0].platform == "tpu":
    raise UserError(
      f"config.mesh.data={data} is no multiple of the {count} slices, between "
      f"which only gradients can be summed: set --config.mesh.data={count}, or "
      "-1, and the others to what is left"
    )
  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Chooses the partition of one array.

  A rule's axis is dropped where it does not divide the dimension. Where `fsdp`
  was dropped, or no rule says where it goes, a big array has its largest
  dimension that is free and divisible put on it; the leading axis of stacked
  layers is never split.

  Args:
    path: the names of the tree, joined by "/".
    shape: of the array.
    mesh: the mesh.
  """
  if math.prod(shape) < MIN_SIZE:
    return P()
  stacked = "/layers/" in path
  chosen = [None] * len(shape)
  for pattern, axes in RULES:
    if re.search(f"{pattern}$", path) and len(shape) == len(axes) + stacked:
      whole = (None,) * stacked + axes
      chosen = [
        axis if axis and n % mesh.shape[axis] == 0 else None
        for axis, n in zip(whole, shape, strict=True)
      ]
      break
  size = mesh.shape["fsdp"]
  free = [
    i
    for i in range(stacked, len(shape))
    if shape[i] % size == 0 and mesh.shape.get(chosen[i], 1) == 1
  ]
  if size > 1 and "fsdp" not in chosen and free:
    chosen[max(free, key=lambda i: shape[i])] = "fsdp"
  return P(*chosen) if any(chosen) else P()


def shardings_for(tree: Any, mesh: Mesh) -> Any:
  """Returns a `NamedSharding` for every leaf (array or shape) of a tree."""

  def choose(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, spec_for("/" + name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(choose, tree)


def with_shardings(abstract: Any, mesh: Mesh) -> Any:
  """Puts their shardings on a tree of `ShapeDtypeStruct`s."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings_for(abstract, mesh),
  )


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
  """Lets kernels that a function calls know the mesh, which XLA cannot split.

  For a function that is to be jitted: modules name no mesh.
  """

  @functools.wraps(function)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return traced


def host_blocks(mesh: Mesh) -> tuple[tuple[int, ...], int]:
  """Returns which rows of a batch this host's devices hold.

  Hosts that only the axis `tensor` tells apart hold the same.

  Returns:
    The numbers of its blocks, rising, and how many equal blocks of consecutive
    rows there are.
  """
  count = mesh.shape["data"] * mesh.shape["fsdp"]
  places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,))
  found = {rows.indices(count)[0] for (rows,) in places.values()}
  return tuple(sorted(found)), count


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays, sharded by example, of this host's rows.

  Args:
    batch: the rows of `host_blocks`.
    mesh: to lay them over.
  """
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }
