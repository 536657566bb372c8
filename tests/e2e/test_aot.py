"""Compiling for TPUs, with their compiler; `pip install 'vlp_jax[tpu]'`."""

import importlib.util
import json

import pytest

from tests.e2e import commands

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
  ),
]


def test_a_small_step(tmp_path):
  status, out, err = commands.run(
    "aot",
    "--config=configs/coca.py:debug",
    "--topology=v5e:2x2",
    "--mesh=2,2,1",
    "--output=found.json",
    "--config.optimizer.name=adamw",
    cwd=tmp_path,
  )
  assert status == 0, err
  assert "fits" in out and "utilisation at most" in out
  found = json.loads((tmp_path / "found.json").read_text())
  (report,) = found["reports"]
  assert report["fits"] and report["chips"] == 4
  assert report["mesh"] == [2, 2, 1]
  # Nothing is rematerialised, so the program does what the model needs.
  ratio = report["operations"] / report["model_operations"]
  assert ratio == pytest.approx(1.0, abs=0.05)
  assert report["sent"]["all-gather"] > 0
  assert report["seconds"]["step"] >= report["seconds"]["model"] > 0


def test_a_kernel_counts(tmp_path):
  status, _, err = commands.run(
    "aot",
    "--config=configs/coca.py:debug",
    "--topology=v5e:2x2",
    "--output=found.json",
    "--config.optimizer.name=adamw",
    "--config.model.attention=tpu",
    cwd=tmp_path,
  )
  assert status == 0, err
  (report,) = json.loads((tmp_path / "found.json").read_text())["reports"]
  assert report["kernels"] == 0  # all say what they do
  # Backward, the kernel makes the scores again.
  assert 1.0 < report["operations"] / report["model_operations"] < 1.1


def test_what_does_not_fit_is_said_with_a_way_out(tmp_path):
  status, out, err = commands.run(
    "aot",
    "--config=configs/coca.py:debug",
    "--topology=v5e:2x2",
    "--config.batch_size=65536",
    cwd=tmp_path,
  )
  assert status == 0, err
  assert "does NOT fit" in out
  assert "try --config" in out


def test_arguments_that_do_not_fit_are_seen(tmp_path):
  """XLA compiles it: what it needs beside them is little."""
  status, out, err = commands.run(
    "aot",
    "--config=configs/coca.py:l14",
    "--topology=v5e:2x2",
    "--mesh=4,1,1",
    "--config.batch_size=160",
    "--config.accumulate=1",
    "--config.optimizer.name=adamw",
    "--config.ema.decay=0.999",
    cwd=tmp_path,
  )
  assert status == 0, err
  assert "does NOT fit 15.8" in out
  assert "try --mesh=1,4,1" in out


def test_no_such_slice(tmp_path):
  status, _, err = commands.run(
    "aot", "--config=configs/clip.py:debug", "--topology=v5e:3x17", cwd=tmp_path
  )
  assert status == 2
  assert "--topology=v5e:3x17 is no slice" in err
