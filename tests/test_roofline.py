"""What a step costs on chips: sums, bounds, memory, advice."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlp_jax import aot, chips, roofline, sharding
from vlp_jax import config as config_lib
from vlp_jax.data import joint
from vlp_jax.errors import UserError
from vlp_jax.hlo import Collective, Work
from vlp_jax.ops import platforms

CHIP = chips.Chip(flops=100.0, memory=1000, bandwidth=10.0, link=1.0, links=4)


def test_bounds_by_hand():
  work = [
    # 2 s of operations, 1 s of bytes, three times.
    Work("fusion", 200, 200, 10, 3, True, None),
    # 1.2 s of operations, in float32, of which one is six.
    Work("fusion", 20, 120, 1, 1, True, None),
    # 4 s of bytes.
    Work("fusion", 0, 0, 40, 1, True, None),
    # Begun, and waited for elsewhere: counts as bytes, not one by one.
    Work("copy-start", 0, 0, 49, 1, False, None),
    # 2 x 3/4 x 40 bytes over four links, twice.
    Work("all-reduce", 0, 0, 0, 2, True, Collective("all-reduce", 40, 4)),
    Work("kernel", 0, 0, 0, 5, True, None),
  ]
  found = roofline.summary(work, 400.0, CHIP, links=4)
  assert found["operations"] == 620 and found["moved"] == 120
  assert found["sent"] == {"all-reduce": 120}
  assert found["collectives"] == {"all-reduce": 2}
  assert found["kernels"] == 5
  assert found["seconds"] == {
    "model": 4.0,
    "operations": 7.2,
    "hbm": 12.0,
    "instructions": 11.2,
    "collectives": 30.0,
    "step": 30.0,
  }


def test_devices_of_one_chip_need_no_links():
  """Two of a TPU7x lie at one place; what lies between them is not known."""
  work = [Work("all-reduce", 0, 0, 8, 1, True, Collective("all-reduce", 8, 2))]
  found = roofline.summary(work, 400.0, CHIP, links=0)
  assert found["seconds"]["collectives"] == 0
  report = dataclasses.replace(
    _found(config_lib.load("configs/clip.py:debug"), (2, 1, 1)), **found
  )
  aot.show(report, CHIP)


def test_a_step_on_clips_is_the_run_s():
  """Its parameters are; positions are resized for pictures of another size."""
  config = config_lib.load(
    "configs/scl.py:debug",
    [
      *("clips.share=0.25", "clips.source=clips.jsonl", "clips.num_frames=2"),
      *("clips.image_size=16", "clips.batch_size=16", "total_steps=8"),
    ],
  )
  assert config.data.image_size != 16
  mesh = sharding.make_mesh((8, 1, 1), jax.devices()[:8])
  (_, _, pictures), (_, _, clips) = joint.configs(config)
  _, state, _ = roofline.abstract_step(config, mesh, pictures)
  _, same, batch = roofline.abstract_step(config, mesh, clips)
  assert state.params == same.params
  assert batch["image"].shape == (16, 2, 16, 16, 3)


def test_memory_that_was_missing_is_read_from_the_error():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G."
  )
  assert roofline.needed(message, 1000) == 17.5 * 2**30
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (21.50G) exceeds available HBM (15.75G)."
  )
  assert roofline.needed(message, 1000) == 21.5 * 2**30 + 1000
  with pytest.raises(UserError, match="XLA cannot compile this step: INTERNAL"):
    roofline.needed("INTERNAL: no\nmore lines", 0)


def test_bytes_of_a_device_s_part():
  mesh = sharding.make_mesh((2, 2, 2), jax.devices()[:8])
  tree = {
    "a": jax.ShapeDtypeStruct(
      (8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
    ),
    "b": jax.ShapeDtypeStruct(
      (5,), jnp.float32, sharding=NamedSharding(mesh, P())
    ),
  }
  assert roofline.shard_bytes(tree) == 4 * 3 * 2 + 5 * 4


@platforms.compiling_for("tpu")
def _report(config, shape, memory):
  mesh = sharding.make_mesh(shape, jax.devices()[:8])
  state = roofline.abstract_state(roofline.on_mesh(config, shape), mesh)
  return roofline.Report(
    method="coca",
    chips=8,
    mesh=shape,
    remat="full",
    batch_size=64,
    accumulate=2,
    parameters=1,
    fits=False,
    memory=memory,
    state=roofline.shard_bytes(state),
    model_operations=1.0,
  )


def test_a_mesh_that_holds_the_state_is_suggested():
  # The kernel is asked for where no TPU is.
  config = config_lib.load("configs/coca.py:b16", ["model.attention=tpu"])
  # Parameters and two moments are 4.9 GiB; of four chips' parts 1.2.
  report = _report(config, (8, 1, 1), 6 * 2**30)
  assert report.state == pytest.approx(4.92 * 2**30, rel=0.01)
  text = roofline.suggest(config, report, jax.devices()[:8], 4 * 2**30)
  assert text.startswith("try --mesh=2,4,1: about 2.3 GiB a chip")
  text = roofline.suggest(config, report, jax.devices()[:8], 1.9 * 2**30)
  assert text.startswith("try --mesh=1,8,1: about 1.7 GiB a chip")


def test_advice_that_a_run_would_take():
  def advice(name, *overrides, mesh=(8, 1, 1), chip=2**30):
    overrides = ("model.attention=tpu", *overrides)
    config = config_lib.load(f"configs/{name}.py:b16", overrides)
    report = _report(config, mesh, 30 * 2**30)
    return roofline.suggest(config, report, jax.devices()[:8], chip)

  text = advice("coca", "batch_size=64", "model.remat=dots")
  assert "and no mesh of 8 chips holds both: try " in text
  assert text.endswith(
    "try --config.model.remat=full, --config.accumulate=2, more chips"
  )
  # It is so already.
  text = advice("coca", "batch_size=64", "model.remat=full")
  assert text.endswith("both: try --config.accumulate=2, more chips")
  # Eight devices have eight examples: one each, in one piece.
  text = advice("coca", "batch_size=8", "model.remat=full")
  assert text.endswith("both: try more chips")
  # The clips' eight cannot be cut, though pictures can.
  text = advice(
    *("scl", "batch_size=64", "model.remat=full", "method.match_group=0"),
    *("clips.share=0.25", "clips.source=clips.jsonl", "clips.batch_size=8"),
    *("clips.num_frames=2", "total_steps=8", "accumulate=1"),
  )
  assert text.endswith("both: try more chips")
  # Two examples are one for each of two devices, and not for eight.
  two = ("coca", "batch_size=2", "accumulate=1", "model.remat=full")
  text = advice(*two, mesh=(2, 1, 4), chip=2**40)
  assert text.endswith("both: try more chips")
  # Its hard negatives are of the whole batch, which no chunk can have.
  text = advice("simla", "model.remat=full")
  assert text.endswith("both: try more chips")


def test_meshes_to_compare():
  assert roofline.splits(8) == [(8, 1, 1), (2, 4, 1), (1, 8, 1)]
  assert roofline.splits(64) == [
    *((64, 1, 1), (16, 4, 1), (4, 16, 1), (1, 64, 1)),
    (4, 4, 4),
  ]


def test_the_mesh_of_a_flag():
  config = config_lib.load("configs/clip.py:debug")
  assert aot.mesh_of(config, "", 8) == (8, 1, 1)
  assert aot.mesh_of(config, "2,4,1", 8) == (2, 4, 1)
  with pytest.raises(UserError, match="such as 64,4,1"):
    aot.mesh_of(config, "2x4", 8)
  with pytest.raises(UserError, match="the slice's 8 chips"):
    aot.mesh_of(config, "2,2,1", 8)


def test_what_is_missing_is_said(monkeypatch):
  with pytest.raises(UserError, match="--topology=KIND:SHAPE is missing"):
    aot.get_devices("")
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'vlp_jax\[tpu\]'"):
    aot.get_devices("v5e:2x2")


@pytest.mark.parametrize(
  "kind, shape, links",
  [
    # An axis of a v5e or v6e is a ring where it has all 16 chips.
    ("TPU v5 lite", (16, 16, 1), 4),
    ("TPU v6 lite", (8, 16, 1), 3),
    ("TPU v5 lite", (4, 8, 1), 2),
    ("TPU v5 lite", (1, 1, 1), 0),
    # Of a v5p, where a slice is made of cubes.
    ("TPU v5", (4, 8, 8), 6),
    ("TPU v5", (2, 4, 4), 3),
    ("TPU v5", (2, 2, 1), 2),
  ],
)
def test_links_of_a_corner(kind, shape, links):
  grid = itertools.product(*map(range, shape))
  devices = [types.SimpleNamespace(coords=place) for place in grid]
  assert roofline.slice_shape(devices) == shape
  assert chips.links(chips.get(kind), shape) == links


def _fake(monkeypatch, examined):
  """Commands see eight chips, and what `examined` says of each mesh."""
  devices = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 8
  monkeypatch.setattr(aot, "get_devices", lambda topology: devices)
  plans = []

  def examine(config, devices, shape, stream):
    plans.append((shape, config.model.remat))
    return examined(stream, shape)

  monkeypatch.setattr(roofline, "examine", examine)
  monkeypatch.setattr(roofline, "suggest", lambda *_: "try another mesh")
  return plans


def _found(config, shape):
  work = [Work("fusion", *[400 * 10**12] * 2, 10**9, 1, True, None)]
  report = roofline.Report(
    method="clip",
    chips=8,
    mesh=shape,
    remat=config.model.remat,
    batch_size=64,
    accumulate=1,
    parameters=1_000_000,
    fits=True,
    memory=2**30,
    state=2**29,
    model_operations=200 * 10**12,
  )
  chip = chips.get("TPU v5 lite")
  change = roofline.summary(work, report.model_operations, chip, links=2)
  return dataclasses.replace(report, **change)


FLAGS = ["--config=configs/clip.py:debug", "--topology=v5e:2x4"]


def test_what_the_command_prints_and_writes(monkeypatch, capsys, tmp_path):
  plans = _fake(monkeypatch, _found)
  path = tmp_path / "more" / "found.json"
  aot.main([*FLAGS, f"--output={path}"])
  assert plans == [((8, 1, 1), "none")]
  out = capsys.readouterr().out
  assert "clip: 1,000,000 parameters, 64 examples a step" in out
  assert "1.0 GiB" in out and "fits" in out and "NOT" not in out
  assert "400.00 T" in out and "2.00 times are done" in out
  assert "utilisation at most 50%" in out
  found = json.loads(path.read_text())
  assert found["config"] == "configs/clip.py:debug"
  assert found["topology"] == "v5e:2x4"
  assert found["reports"][0]["operations"] == 400e12


def test_a_mesh_that_is_too_small_comes_with_advice(monkeypatch, capsys):
  def small(config, shape):
    report = _found(config, shape)
    return dataclasses.replace(report, fits=False, seconds={})

  _fake(monkeypatch, small)
  aot.main(FLAGS)
  out = capsys.readouterr().out
  assert "does NOT fit" in out and "try another mesh" in out


def test_a_sweep_compares_meshes_and_policies(monkeypatch, capsys):
  def picky(config, shape):
    if shape == (2, 4, 1) and config.model.remat == "dots":
      raise UserError("that cannot be")
    return _found(config, shape)

  plans = _fake(monkeypatch, picky)
  aot.main([*FLAGS, "--sweep"])
  policies = ("none", "full", "dots")
  assert plans == [
    (shape, remat)
    for shape in ((8, 1, 1), (2, 4, 1), (1, 8, 1))
    for remat in policies
  ]
  out = capsys.readouterr().out
  assert "left out: that cannot be" in out
  assert out.count("50%") == 2 * 8  # of each, and in the table at the end


def test_steps_on_clips_are_compiled_too(monkeypatch, capsys, tmp_path):
  def examined(config, shape):
    report = dataclasses.replace(_found(config, shape), links=2)
    frames = config.data.num_frames
    if not frames:
      return report
    slower = {k: 3 * v for k, v in report.seconds.items()}
    return dataclasses.replace(
      report,
      memory=2**31,
      seconds=slower,
      sent={"all-reduce": 8e9},
      collectives={"all-reduce": 4},
      links=2,
    )

  plans = _fake(monkeypatch, examined)
  path = tmp_path / "found.json"
  aot.main(
    [
      *("--config=configs/scl.py:debug", "--topology=v5e:2x4"),
      *("--config.clips.share=0.25", "--config.clips.source=clips.jsonl"),
      *("--config.total_steps=8", f"--output={path}"),
    ]
  )
  assert len(plans) == 2
  reports = json.loads(path.read_text())["reports"]
  streams = [(r["stream"], r["share"]) for r in reports]
  assert streams == [("train", 0.75), ("train_clips", 0.25), ("mean", 1.0)]
  out = capsys.readouterr().out
  assert "compiling train for" in out and "compiling train_clips for" in out
  *_, both = out.split("mean of these")
  one = 400e12 / 197e12
  assert f"{1000 * one * 1.5:.1f} ms" in both  # three quarters 1, a quarter 3
  assert "2.0 GiB" in both and "2.000 GB" in both


def test_a_run_fits_where_all_its_steps_do():
  config = config_lib.load("configs/clip.py:debug")
  fits = _found(config, (8, 1, 1))
  too_big = dataclasses.replace(fits, fits=False, memory=2**40, seconds={})
  both = roofline.mean(
    [dataclasses.replace(one, share=0.5) for one in (fits, too_big)]
  )
  assert (both.fits, both.memory, both.seconds) == (False, 2**40, {})


def test_an_impossible_mesh_of_one_s_own_is_an_error(monkeypatch):
  def refuse(config, shape):
    raise UserError("that cannot be")

  _fake(monkeypatch, refuse)
  with pytest.raises(UserError, match="that cannot be"):
    aot.main(FLAGS)
