"""Where arrays live: the rules, and every parameter of the large configs.

`tests/golden/partition_specs.json` holds the partition of each parameter on a
mesh of data 2 x fsdp 2 x tensor 2: of each method's `b16`, and of its larger
sizes what differs. After a change that is meant, write it
anew, and read the difference:

  python -m tests.test_sharding
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax import optim, sharding, train_state
from vlp_jax.errors import UserError
from vlp_jax.methods import base

GOLDEN = pathlib.Path(__file__).parent / "golden" / "partition_specs.json"
CONFIGS = ("albef", "clip", "coca", "scl", "simla", "sycoca")
# Beside `b16`.
SIZES = {name: ("l14", "g14") for name in CONFIGS} | {
  "coca": ("l14", "b18", "l18", "g18"),
  "sycoca": ("l14", "g14", "b18"),
  "scl": ("l14", "g14", "reference"),
  "simla": ("l14", "g14", "reference"),
}
LARGER = [(name, size) for name in CONFIGS for size in SIZES[name]]


def _mesh(*shape):
  return sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _state(name, *overrides, size="b16"):
  """The abstract state of a whole run."""
  config = config_lib.load(f"configs/{name}.py:{size}", overrides)
  method = base.get(name, config)
  optimizer, _ = optim.make_optimizer(config, 100, 10)
  spec = train_state.batch_spec(config)
  return jax.eval_shape(
    lambda: train_state.create(method, optimizer, spec, seed=0, use_ema=True)
  )


def _specs(name, size="b16"):
  """Path -> partition, as JSON has it, of every parameter."""
  params = _state(name, size=size).params
  shardings = sharding.shardings_for(params, _mesh(2, 2, 2))
  return {
    _name(path): list(s.spec)
    for path, s in jax.tree_util.tree_leaves_with_path(shardings)
  }


def test_the_mesh():
  mesh = _mesh(2, 2, 2)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  # Neighbours share a model: they talk most.
  assert [d.id for d in mesh.devices.reshape(-1)] == list(range(8))


@dataclasses.dataclass(frozen=True)
class Device:
  """What the order of devices in a mesh is made from."""

  id: int
  slice_index: int
  coords: tuple[int, ...] = ()
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"
  core_on_chip: int = 0


def _slices(count, *shape):
  """Chips of so many slices."""
  places = itertools.product(range(count), *map(range, shape))
  return [Device(i, s, (*xy, 0)) for i, (s, *xy) in enumerate(places)]


def test_a_slice_s_axes_may_be_split_over_two_of_the_mesh():
  devices = _slices(1, 8, 8)
  grid = sharding.arrange((16, 4, 1), devices)
  assert grid.shape == (16, 4, 1) and set(grid.flat) == set(devices)
  for row in grid[:, :, 0]:  # a line of neighbours
    lines = [len({d.coords[axis] for d in row}) for axis in (0, 1)]
    assert sorted(lines) == [1, 4]


def test_slices_lie_along_data():
  devices = _slices(2, 4, 4)
  grid = sharding.arrange((8, 2, 2), devices[::-1])
  assert grid.shape == (8, 2, 2) and set(grid.flat) == set(devices)
  assert {d.slice_index for d in grid[:4].flat} == {0}
  assert {d.slice_index for d in grid[4:].flat} == {1}


def test_parameters_are_not_gathered_between_slices():
  with pytest.raises(UserError, match="data=1 is no multiple of the 2 slices"):
    sharding.arrange((1, 32, 1), _slices(2, 4, 4))


@pytest.mark.parametrize("shape", [(2, 8, 1), (4, 2, 2), (1, 16, 1)])
def test_nodes_of_gpus(shape):
  devices = [
    Device(i, i // 8, platform="gpu", device_kind="NVIDIA H100")
    for i in range(16)
  ]
  grid = sharding.arrange(shape, devices)
  assert [d.id for d in grid.flat] == list(range(16))


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
  golden = json.loads(GOLDEN.read_text())[name]
  assert _specs(name) == golden, (
    "if this is meant: python -m tests.test_sharding"
  )


@pytest.mark.parametrize(("name", "size"), LARGER)
def test_golden_of_larger_sizes(name, size):
  golden = json.loads(GOLDEN.read_text())
  expected = golden[name] | golden[f"{name}:{size}"]  # null: is not there
  assert _specs(name, size) == {
    k: v for k, v in expected.items() if v is not None
  }


F, T = "fsdp", "tensor"
LAYERS = "/params/vision/transformer/layers"


@pytest.mark.parametrize(
  "path, shape, expected",
  [
    # Stacked layers: the first axis is the layer's.
    ("self_attention/qkv/kernel", (4, 64, 3, 8, 16), (None, F, None, T, None)),
    ("cross_attention/kv/kernel", (4, 64, 2, 8, 16), (None, F, None, T, None)),
    ("cross_attention/q/kernel", (4, 64, 8, 16), (None, F, T, None)),
    ("self_attention/out/proj/kernel", (4, 8, 16, 64), (None, T, None, F)),
    ("mlp/up/kernel", (4, 64, 256), (None, F, T)),
    ("mlp/down/kernel", (4, 256, 64), (None, T, F)),
    # What does not divide is not split: 3 heads, on 2 devices.
    ("cross_attention/q/kernel", (4, 64, 3, 128), (None, F, None, None)),
    # No rule: the largest dimension; never the layers, however many.
    ("mlp/up/bias", (64, 512), (None, F)),
    ("mlp/up/bias", (20_000, 3), ()),
    ("mlp_norm/scale", (32_768, 1), ()),
    # Small.
    ("mlp/up/kernel", (2, 64, 64), ()),
  ],
)  # fmt: skip
def test_rules_of_stacks(path, shape, expected):
  spec = sharding.spec_for(f"{LAYERS}/{path}", shape, _mesh(2, 2, 2))
  assert spec == P(*expected)


@pytest.mark.parametrize(
  "path, shape, expected",
  [
    ("text/embedding/embedding", (512, 64), (T, F)),
    ("vocabulary/kernel", (64, 512), (F, T)),
    ("pool/q/kernel", (64, 8, 64), (F, T, None)),
    ("pool/out/kernel", (8, 64, 64), (T, None, F)),
    ("pool/query", (64, 512), (None, F)),
    ("vision/patch/kernel", (16, 16, 3, 64), (None, None, None, F)),
    ("vision/pos", (257, 64), (None, F)),
    ("odd", (129, 131), ()),
    # A moment that is factored has another shape, and finds its own way.
    ("v_row/vocabulary/kernel", (2**15,), (F,)),
  ],
)  # fmt: skip
def test_other_rules(path, shape, expected):
  spec = sharding.spec_for(f"/params/{path}", shape, _mesh(2, 2, 2))
  assert spec == P(*expected)


def test_small_means_less_than_min_size():
  mesh, path = _mesh(2, 2, 2), "/params/vocabulary/kernel"
  assert sharding.spec_for(path, (64, 254), mesh) == P()
  assert sharding.spec_for(path, (64, 256), mesh) == P("fsdp", "tensor")
  assert sharding.MIN_SIZE == 64 * 256


@pytest.mark.parametrize(
  "path, shape, expected",
  [
    # ViT-g's width, 1408, is 256 times no whole number; its MLP's is.
    ("mlp/up/kernel", (40, 1408, 6144), (None, None, F)),
    ("mlp/down/kernel", (40, 6144, 1408), (None, F, None)),
    (
      "self_attention/qkv/kernel",
      (40, 1408, 3, 16, 88),
      (*[None] * 3, T, None),
    ),
  ],
)
def test_another_dimension_where_the_rule_s_does_not_divide(
  path, shape, expected
):
  mesh = jax.sharding.AbstractMesh((1, 256, 1), sharding.AXES)
  assert sharding.spec_for(f"{LAYERS}/{path}", shape, mesh) == P(*expected)


def test_without_fsdp_nothing_falls_back_to_it():
  path = "/params/vision/pos"
  assert sharding.spec_for(path, (256, 64), _mesh(4, 1, 2)) == P()


@pytest.mark.parametrize(
  "name, optimizer",
  [
    *(("clip", "adamw"), ("sycoca", "adamw"), ("sycoca", "muon")),
    ("coca", "adafactor"),
  ],
)
def test_moments_and_averages_follow_their_parameters(name, optimizer):
  state = _state(name, f"optimizer.name={optimizer}")
  shardings = sharding.shardings_for(state, _mesh(2, 2, 2))
  specs = {
    (_name(path), leaf.shape): s.spec
    for (path, leaf), s in zip(
      jax.tree_util.tree_leaves_with_path(state.params),
      jax.tree.leaves(shardings.params),
      strict=True,
    )
  }
  toys.assert_trees_equal(
    jax.tree.leaves(shardings.params), jax.tree.leaves(shardings.ema_params)
  )
  followed = 0
  for (path, leaf), s in zip(
    jax.tree_util.tree_leaves_with_path(state.opt_state),
    jax.tree.leaves(shardings.opt_state),
    strict=True,
  ):
    for (name, shape), spec in specs.items():
      if _name(path).endswith(f"/{name}") and leaf.shape == shape:
        assert s.spec == spec, path
        followed += 1
  # Two moments each under AdamW; one of matrices under Muon, one of all under
  # Adafactor.
  assert followed >= len(specs) * (2 if optimizer == "adamw" else 1)


def test_no_big_parameter_is_copied_to_every_device():
  """All leaves of a megabyte are split over fsdp."""
  for name, size in [*((name, "b16") for name in CONFIGS), *LARGER]:
    specs = _specs(name, size)
    params = _state(name, size=size).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      if leaf.size * 4 >= 2**20:
        assert "fsdp" in specs[_name(path)], path


def test_keys_are_everywhere():
  mesh = _mesh(2, 2, 2)
  tree = {"key": jax.random.key(0), "step": np.int32(0)}
  shardings = sharding.shardings_for(tree, mesh)
  assert shardings == dict.fromkeys(tree, NamedSharding(mesh, P()))
  jax.device_put(tree, shardings)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_batches_are_split_by_example(shape):
  mesh = _mesh(*shape)
  batch = toys.batch(16)
  put = sharding.put_batch(batch, mesh)
  rows = 16 // (shape[0] * shape[1])
  for name, array in put.items():
    np.testing.assert_array_equal(array, batch[name])
    for shard in array.addressable_shards:
      assert shard.data.shape == (rows, *batch[name].shape[1:])


def _write():
  """Writes the golden file: one line a parameter."""
  found = {name: _specs(name) for name in CONFIGS}
  for name, size in LARGER:
    smaller, specs = found[name], _specs(name, size)
    found[f"{name}:{size}"] = {
      path: specs.get(path)
      for path in {**smaller, **specs}
      if specs.get(path) != smaller.get(path)
    }
  blocks = []
  for name, specs in found.items():
    lines = [
      f"  {json.dumps(path)}: {json.dumps(spec)}"
      for path, spec in sorted(specs.items())
    ]
    blocks.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
  GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  _write()
