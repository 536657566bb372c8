"""Checkpoints: bit-exact, atomic, on any mesh, and what goes wrong with them.

Some tests need a process of their own (to be killed, or with eight devices):
they run this file as a script, with the name of a function in `CHILDREN`.
"""

import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlp_jax import checkpoint, hosts, optim
from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.train_state import TrainState

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_state(seed=0, ema=True, width=256, optimizer="adamw"):
  """A state with every kind of leaf: keys, bfloat16, scalars, empty nodes."""
  rng = np.random.default_rng(seed)
  params = {
    "layers": {"up": {"kernel": rng.normal(size=(2, 64, width))}},
    "logit_scale": rng.normal(),
  }
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  config = config_lib.default_config()
  config.optimizer.update(name=optimizer, mu_dtype="bfloat16")
  tx, _ = optim.make_optimizer(config, 10, 2)
  return TrainState(
    step=jnp.int32(seed),
    params=params,
    opt_state=tx.update(params, tx.init(params), params)[1],
    ema_params=jax.tree.map(lambda x: x + 1, params) if ema else None,
    method_state={"queue": jnp.arange(8.0), "pointer": jnp.int32(3)},
    key=jax.random.key(seed),
  )


def make_mesh(shape):
  axes = ("data", "fsdp", "tensor")
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3)


def abstract(state, shape=(1, 1, 1)):
  """Shapes of a state, with matrices sharded over a mesh."""
  mesh = make_mesh(shape)

  def describe(x):
    spec = (None, "fsdp", "tensor") if x.ndim == 3 else ()
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(describe, state)


def assert_equal(a, b):
  """Same structure, dtypes and bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_all(directory, *steps):
  saver = checkpoint.Checkpointer(directory, keep=9)
  for step in steps:
    saver.save(step, make_state(step), {"step": step})
  saver.close()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema", [True, False])
def test_round_trip(tmp_path, ema, optimizer):
  state = make_state(5, ema, optimizer=optimizer)
  saver = checkpoint.Checkpointer(tmp_path)
  assert saver.latest_step() is None
  meta = {"fingerprint": {"name": "scenes"}, "seconds": 1.5}
  saver.save(5, state, meta)
  saver.save(5, make_state(6), {})  # is there already
  saver.wait()
  restored, restored_meta = saver.restore(abstract(state))
  assert_equal(restored, state)
  assert restored_meta == meta
  params, ema_params, restored_meta = saver.restore_params(
    abstract(state.params)
  )
  assert_equal(params, state.params)
  assert_equal(ema_params, state.ema_params)
  assert restored_meta == meta
  saver.close()


def test_the_state_may_be_donated_at_once(tmp_path):
  state = jax.tree.map(jnp.copy, make_state(1, width=4096))
  want = make_state(1, width=4096)
  saver = checkpoint.Checkpointer(tmp_path)
  spoil = jax.jit(
    lambda s: s.replace(params=jax.tree.map(lambda x: x * 0, s.params)),
    donate_argnums=0,
  )
  saver.save(1, state, {})
  for _ in range(3):
    state = spoil(state)
  jax.block_until_ready(state)
  saver.wait()
  assert_equal(saver.restore(abstract(want))[0], want)
  saver.close()


def test_the_last_and_the_best_are_kept(tmp_path):
  def opened():
    return checkpoint.Checkpointer(tmp_path, keep=2, best_metric="val/r1")

  saver = opened()
  scores = [0.1, 0.9, None, 0.3, float("nan"), 0.2]
  for step, score in enumerate(scores):
    metrics = {} if score is None else {"val/r1": score, "val/other": 7.0}
    saver.save(step, {"w": jnp.ones(3)}, {}, metrics)
  saver.close()
  assert {p.name for p in tmp_path.iterdir()} == {"1", "4", "5"}
  saver = opened()  # it reads the scores back
  assert (saver.best_step(), saver.latest_step()) == (1, 5)
  saver.save(6, {"w": jnp.ones(3)}, {}, {"val/r1": 0.9})
  saver.close()
  assert {p.name for p in tmp_path.iterdir()} == {"5", "6"}
  assert saver.best_step() == 6
  plain = checkpoint.Checkpointer(tmp_path, keep=2)
  assert plain.best_step() is None
  plain.close()


def test_another_structure_is_refused(tmp_path):
  save_all(tmp_path, 1)
  saver = checkpoint.Checkpointer(tmp_path)
  wider = abstract(make_state(1, width=512))
  with pytest.raises(UserError) as error:
    saver.restore(wider)
  text = str(error.value)
  path = "params/layers/up/kernel: (2, 64, 256) float32 -> (2, 64, 512) float32"
  assert path in text and "\n" not in text
  assert text.count("->") == 4  # parameters, average and two moments
  with pytest.raises(UserError, match=r"ema_params/logit_scale: .* \(none\)"):
    saver.restore(abstract(make_state(1, ema=False)))
  many = {f"w{i}": jnp.ones(3) for i in range(9)}
  with pytest.raises(UserError, match=r": ema_params.*\(none\); and \d+ more$"):
    saver.restore(abstract(many))
  with pytest.raises(UserError, match="params/layers/up/kernel"):
    saver.restore_params(wider.params)
  assert saver.latest_step() == 1  # none of this is damage
  saver.close()


def test_parameters_alone(tmp_path):
  params = make_state(1).params
  checkpoint.save_params(tmp_path / "params", params)
  target = abstract(params)
  assert_equal(checkpoint.load_params(tmp_path / "params", target), params)
  with pytest.raises(UserError, match="layers/up/kernel: "):
    wider = abstract(make_state(1, width=512).params)
    checkpoint.load_params(tmp_path / "params", wider)
  with pytest.raises(UserError, match="no parameters in"):
    checkpoint.load_params(tmp_path / "none", target)
  (tmp_path / "params" / "manifest.ocdbt").unlink()
  with pytest.raises(UserError, match="is damaged"):
    checkpoint.load_params(tmp_path / "params", target)
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="Not a directory"):
    checkpoint.save_params(tmp_path / "file" / "params", params)


def test_missing_checkpoints(tmp_path):
  reader = checkpoint.Checkpointer(tmp_path / "none", writable=False)
  assert not (tmp_path / "none").exists()
  with pytest.raises(UserError, match="no checkpoint in"):
    reader.restore({})
  save_all(tmp_path / "some", 1, 2)
  reader = checkpoint.Checkpointer(tmp_path / "some", writable=False)
  with pytest.raises(UserError, match=r"of step 7 .* there are 1, 2"):
    reader.restore({}, step=7)


# TensorStore's other reads end after the first that fails was reported.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["data", "index", "metadata", "meta"])
@pytest.mark.parametrize("cut", [0.5, None])
def test_damage_falls_back_to_the_one_before(tmp_path, kind, cut):
  save_all(tmp_path, 1, 2)
  broken = {
    "data": max((tmp_path / "2").rglob("d/*"), key=lambda p: p.stat().st_size),
    "index": tmp_path / "2/state/manifest.ocdbt",
    "metadata": tmp_path / "2/state/_METADATA",
    "meta": tmp_path / "2/meta/metadata",
  }[kind]
  whole = broken.read_bytes()
  broken.unlink()
  if cut:
    broken.write_bytes(whole[: int(cut * len(whole))])
  saver = checkpoint.Checkpointer(tmp_path)
  target = abstract(make_state(1))
  with pytest.raises(UserError, match=f"{tmp_path}/2 is damaged"):
    saver.restore(target, step=2)
  restored, meta = saver.restore(target)
  assert_equal(restored, make_state(1))
  assert meta == {"step": 1}
  saver.save(2, make_state(2), {"step": 2})  # its place is free again
  saver.wait()
  assert_equal(saver.restore(target)[0], make_state(2))
  saver.close()
  gc.collect()  # so that those other reads end here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_of_a_step_that_was_damaged_before(tmp_path):
  """It was set aside, saved anew, and is damaged again."""
  target, saver = abstract(make_state(1)), checkpoint.Checkpointer(tmp_path, 9)
  saver.save(1, make_state(1), {})
  for _ in range(3):
    saver.save(2, make_state(2), {})
    saver.wait()
    (tmp_path / "2/state/manifest.ocdbt").unlink()
    assert_equal(saver.restore(target)[0], make_state(1))
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"1", "2.damaged", "2.damaged2", "2.damaged3"}
  saver.close()
  assert checkpoint.Checkpointer(tmp_path).latest_step() == 1
  gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_that_one_of_several_hosts_sees(tmp_path, monkeypatch):
  """Others may be about to read it: all start again, from the one before."""
  save_all(tmp_path, 1, 2)
  savers = [checkpoint.Checkpointer(tmp_path) for _ in range(2)]
  (tmp_path / "2/state/manifest.ocdbt").unlink()
  monkeypatch.setattr(hosts, "several", lambda: True)
  target = abstract(make_state(1))
  for saver in savers:  # the second finds that it is gone
    with pytest.raises(hosts.StartAgainError, match=r"2 is damaged \(.*aside"):
      saver.restore(target)
    saver.close()
  assert {path.name for path in tmp_path.iterdir()} == {"1", "2.damaged"}
  saver = checkpoint.Checkpointer(tmp_path)
  assert_equal(saver.restore(target)[0], make_state(1))
  (tmp_path / "1/state/manifest.ocdbt").unlink()
  with pytest.raises(UserError, match="1 is damaged"):  # there is no other
    saver.restore(target)
  assert (tmp_path / "1").exists()
  saver.close()
  gc.collect()


def _flip(path, place, bit=3):
  """Flips a bit at a place, a share of the file."""
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= 1 << bit
  path.write_bytes(data)


@pytest.mark.parametrize("kind", ["data", "metadata", "shapes", "meta"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_falls_back_to_the_one_before(tmp_path, kind):
  """The arrays' files have no checksum of their own, nor has JSON."""
  save_all(tmp_path, 1, 2)
  state = tmp_path / "2/state"
  if kind == "data":
    data = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    _flip(data, 0.5)
  elif kind == "metadata":
    _flip(state / "_METADATA", 0.5, 7)  # no character
  elif kind == "shapes":
    (path,) = (state / "array_metadatas").iterdir()
    path.write_text(path.read_text().replace("param_name", "qaram_name", 1))
  else:
    path = tmp_path / "2/meta/metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3', 1))
  saver = checkpoint.Checkpointer(tmp_path)
  target = abstract(make_state(1))
  with pytest.raises(UserError, match=f"{tmp_path}/2 is damaged"):
    saver.restore(target, step=2)
  if kind == "meta":
    with pytest.raises(UserError, match="saved is not what is read"):
      saver.restore_params(target.params, step=2)
  restored, meta = saver.restore(target)
  assert_equal(restored, make_state(1))
  assert meta == {"step": 1}
  assert {path.name for path in tmp_path.iterdir()} == {"1", "2.damaged"}
  saver.close()
  gc.collect()


def test_what_may_pass_is_no_damage(tmp_path, monkeypatch):
  save_all(tmp_path, 1, 2)
  saver = checkpoint.Checkpointer(tmp_path)
  for error in (ValueError("UNAVAILABLE: try again"), MemoryError()):

    def fail(*args, error=error, **kwargs):
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(saver._manager, "restore", fail)
      with pytest.raises(type(error)):
        saver.restore(abstract(make_state(1)))
  assert saver.latest_step() == 2
  saver.close()


def test_a_file_in_the_way(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"cannot write .* \(Not a directory\)"):
    checkpoint.Checkpointer(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(UserError, match=r"cannot write .* \(Permission denied\)"):
    checkpoint.Checkpointer(tmp_path / "checkpoints")


def test_no_folder_to_save_in(tmp_path, monkeypatch):
  """It is told at once, and no thread is left to keep the process."""
  before = set(threading.enumerate())
  saver = checkpoint.Checkpointer(tmp_path)

  def fail(*args, **kwargs):
    raise PermissionError(13, "Permission denied", str(tmp_path))

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "mkdir", fail)
    patch.setattr(os, "makedirs", fail)
    patch.setattr(os, "mkdir", fail)
    with pytest.raises(UserError, match="Permission denied"):
      saver.save(1, make_state(1), {})
  saver.close()
  left = set(threading.enumerate()) - before
  idle = "asyncio_"  # pools end with the process
  assert not [t for t in left if not (t.daemon or t.name.startswith(idle))]


def test_a_full_disk(tmp_path):
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip("cannot mount a small file system here")
  try:
    saver = checkpoint.Checkpointer(tmp_path / "c")
    small = {"w": jnp.ones(3)}
    saver.save(1, small, {})
    noise = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    saver.save(2, {"w": jnp.asarray(noise)}, {})
    with pytest.raises(UserError, match=r"/c \(No space left on device\)"):
      saver.save(3, small, {})
    again = checkpoint.Checkpointer(tmp_path / "c")  # clears the rest
    assert again.latest_step() == 1
    again.save(3, small, {})
    again.close()
    assert again.latest_step() == 3
  finally:
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def run_child(name, *args, **env):
  return subprocess.Popen(
    [sys.executable, __file__, name, *map(str, args)],
    env={**os.environ, "PYTHONPATH": str(_ROOT), **env},
    stdout=subprocess.PIPE,
    text=True,
  )


def child_is_killed_while_saving(directory, moment):
  """`first`: a save is under way; `last`: it only lacks its name."""

  def slow(rename):
    def renamed(old, new, **kwargs):
      if os.fspath(new) != os.path.join(directory, "2"):
        return rename(old, new, **kwargs)
      if moment == "last":
        os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(60)  # however fast the disk is, the other moment is before

    return renamed

  os.rename, os.replace = slow(os.rename), slow(os.replace)
  saver = checkpoint.Checkpointer(directory)
  saver.save(1, make_state(1), {"step": 1})
  saver.wait()
  big = np.random.default_rng(0).normal(size=(8, 1 << 22)).astype(np.float32)
  saver.save(2, jax.tree.map(jnp.asarray, list(big)), {"step": 2})
  if moment == "first":
    os.kill(os.getpid(), signal.SIGKILL)
  saver.wait()


@pytest.mark.parametrize("moment", ["first", "last"])
def test_killed_while_saving(tmp_path, moment):
  child = run_child("child_is_killed_while_saving", tmp_path, moment)
  assert child.wait() == -signal.SIGKILL
  left = sorted(p.name for p in tmp_path.iterdir())
  assert left[0] == "1" and left[1].startswith("2.") and len(left) == 2
  if moment == "last":  # all of it was written
    whole, cut = (tmp_path / name / "state" for name in left)
    assert {p.name for p in whole.iterdir()} <= {p.name for p in cut.iterdir()}
  reader = checkpoint.Checkpointer(tmp_path, writable=False)
  assert reader.latest_step() == 1 and (tmp_path / left[1]).exists()
  saver = checkpoint.Checkpointer(tmp_path, keep=2)
  assert saver.latest_step() == 1
  assert_equal(saver.restore(abstract(make_state(1)))[0], make_state(1))
  saver.save(2, make_state(2), {"step": 2})
  saver.close()
  assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def child_changes_mesh(directory):
  assert jax.device_count() == 8
  saver = checkpoint.Checkpointer(directory, keep=2)
  for shape in ((2, 2, 2), (1, 8, 1)):
    state, _ = saver.restore(abstract(make_state(1), shape))
    kernel = state.params["layers"]["up"]["kernel"]
    pieces = {s.data.shape for s in kernel.addressable_shards}
    assert pieces == {(2, 64 // shape[1], 256 // shape[2])}
    assert_equal(state, make_state(1))
  saver.save(2, state, {})
  saver.close()


def test_another_mesh(tmp_path):
  """One device to eight, on two meshes, and back to one."""
  save_all(tmp_path, 1)
  child = run_child(
    "child_changes_mesh", tmp_path, JAX_NUM_CPU_DEVICES="8", XLA_FLAGS=""
  )
  assert child.wait() == 0
  saver = checkpoint.Checkpointer(tmp_path)
  assert_equal(saver.restore(abstract(make_state(1)), 2)[0], make_state(1))
  shutil.rmtree(tmp_path / "1")
  saver.close()


CHILDREN = (child_is_killed_while_saving, child_changes_mesh)

if __name__ == "__main__":
  {f.__name__: f for f in CHILDREN}[sys.argv[1]](*sys.argv[2:])
