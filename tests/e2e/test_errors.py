"""A mistake of the user's ends in one clear line and status 2."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.e2e import commands

DEBUG = "--config=configs/coca.py:debug"


def _jsonl(tmp_path, *lines):
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(lines) + "\n")
  return f"--config.data.source={path}"


@pytest.fixture(scope="module", autouse=True)
def _made(scenes):
  """So that a command's one line is not the second."""


def _cases():
  return {
    "unknown field": ([DEBUG, "--config.batchsize=8"], "batch_size"),
    "unknown size": (["--config=configs/coca.py:huge"], "tiny"),
    "unknown config": (["--config=configs/cocoa.py"], "configs/coca.py"),
    "unknown flag": ([DEBUG, "--work_dir=x"], "--workdir"),
    "wrong type": ([DEBUG, "--config.batch_size=many"], "int"),
    "mesh": ([DEBUG, "--config.mesh.data=3"], "mesh"),
    "accumulate": ([DEBUG, "--config.accumulate=3"], "batch_size"),
    "long text": ([DEBUG, "--config.tokenizer.max_len=64"], "max_len"),
    "patches": ([DEBUG, "--config.model.vision.patch_size=7"], "patch_size"),
    "method": (
      [DEBUG, "--config.method.name=cocoa"],
      "albef, clip, coca, scl, simla",
    ),
    "optimizer": ([DEBUG, "--config.optimizer.name=adm"], "adamw"),
    "data set": ([DEBUG, "--config.data.name=no_such_data"], "no_such_data"),
    "source": ([DEBUG, "--config.data.source=/no/such.jsonl"], "/no/such"),
  }


@pytest.mark.parametrize("name", list(_cases()))
def test_one_line_and_status_2(name, tmp_path):
  args, hint = _cases()[name]
  # Some as a user would; all would take as many seconds to import JAX.
  alone = name in ("unknown field", "mesh", "data set")
  run = commands.run if alone else commands.run_here
  status, _, err = run(
    "main", *args, f"--workdir={tmp_path / 'run'}", cwd=tmp_path
  )
  commands.assert_one_line(status, err, hint)


def test_preempted_before_there_is_anything_to_save(tmp_path):
  """As early as in the middle of its imports."""
  workdir = tmp_path / "run"
  process = commands.start("main", DEBUG, f"--workdir={workdir}", cwd=tmp_path)
  commands.wait_until_sigterm_is_caught(process)
  process.terminate()
  _, err = process.communicate(timeout=600)
  assert process.returncode == 75, err
  assert err == "preempted with nothing to save; the same command resumes\n"


def test_a_run_that_only_skips_updates_and_its_profile(tmp_path):
  """The learning rate throws the parameters out of range at once."""
  workdir = tmp_path / "run"
  status, out, err = commands.run(
    "main",
    "--config=configs/clip.py:debug",
    f"--workdir={workdir}",
    *commands.SMALL,
    *commands.no_evaluations("configs/clip.py:debug"),
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.max_skipped=3",
    "--config.profile=2:3",
    cwd=tmp_path,
  )
  warning, *rest = commands.said(err)
  assert warning.startswith("WARNING:absl:evaluations left out")
  error = "\n".join(rest)
  commands.assert_one_line(status, error, "at step 4: from step 2 on")
  # That of step 2 would have had what the first update has left.
  assert "there is no checkpoint;" in error
  assert not list((workdir / "checkpoints").iterdir())
  lines = commands.lines(workdir)
  assert [line["train/skipped"] for line in lines] == [0, 1, 2, 3]
  # Skipped updates do not move the schedule, which still warms up.
  assert len({line["train/learning_rate"] for line in lines}) == 1
  assert f"xprof --logdir={workdir / 'profile'}" in out
  (trace,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
  assert _steps(trace) == {2, 3}


def _steps(trace):
  """Returns the numbers of the steps that a profile shows."""
  from jax.profiler import ProfileData

  return {
    dict(event.stats)["step_num"]
    for plane in ProfileData.from_file(str(trace)).planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  }


def test_no_checkpoint_is_made_in_a_row_of_skipped_updates(tmp_path):
  """It would push out one from before; it is made after the row, or scored."""
  name = "val/retrieval/i2t_r1"
  workdir, _ = commands.train(
    "clip",
    "run",
    *commands.no_evaluations("configs/clip.py:debug", but=("validation",)),
    "--config.total_steps=16",
    "--config.batch_size=4",
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=16",
    f"--config.checkpoint.best_metric={name}",
    "--config.evals.validation.every_steps=3",
    "--config.optimizer.max_spike=1.01",
    cwd=tmp_path,
  )
  lines = commands.lines(workdir)
  scored = {line["step"] for line in lines if name in line}
  assert scored == {3, 6, 9, 12, 15, 16}
  counts = [line["train/skipped"] for line in lines if "train/skipped" in line]
  pairs = enumerate(itertools.pairwise([0, *counts]), start=1)
  skipped = {step for step, (before, after) in pairs if after > before}
  saved, owed = set(), False
  for step in range(1, 17):
    owed |= step % 2 == 0
    if owed and (step in scored or step not in skipped):
      saved.add(step)
      owed = False
  names = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert names == {str(step) for step in saved}
  # The first that is applied after a row is enough.
  assert saved & {i + 1 for i in skipped} - skipped
  # In a row for its score; due, but in a row; scored, but not due.
  assert saved & skipped and set(range(2, 17, 2)) - saved and scored - saved


_FAILING = """
from vlp_jax import command, main, train

def fail(*_):
  raise RuntimeError("cannot evaluate")

train.evaluate = fail
command.execute(main.main)
"""


def test_an_evaluation_that_fails_at_the_end_loses_no_training(tmp_path):
  flags = [
    "--config=configs/clip.py:debug",
    f"--workdir={tmp_path / 'run'}",
    *commands.SMALL,
    "--config.total_steps=3",
    "--config.checkpoint.every_steps=0",
    "--config.log.every_steps=0",
  ]
  failed = subprocess.run(
    [sys.executable, "-c", _FAILING, *flags],
    cwd=tmp_path,
    env=commands.environ(),
    capture_output=True,
    text=True,
  )
  assert failed.returncode == 1 and "cannot evaluate" in failed.stderr
  status, out, err = commands.run("main", *flags, cwd=tmp_path)
  assert status == 0, err
  assert "already trained for 3 steps: evaluating" in out
  (line,) = commands.lines(tmp_path / "run")
  assert line["step"] == 3 and "train/loss" in line
  assert commands.results(tmp_path / "run")["step"] == 3


def test_a_jsonl_that_is_broken_at_a_line(tmp_path):
  good = json.dumps({"image": "a.png", "caption": "a"})
  source = _jsonl(tmp_path, good, '{"image": "b.png", "caption": ')
  status, _, err = commands.run_here(
    "main", DEBUG, source, f"--workdir={tmp_path / 'run'}", cwd=tmp_path
  )
  commands.assert_one_line(status, err, "pairs.jsonl:2")


def test_pictures_that_are_not_there(tmp_path):
  rows = [json.dumps({"image": f"{i}.png", "caption": "a"}) for i in range(3)]
  status, _, err = commands.run_here(
    "main", DEBUG, _jsonl(tmp_path, *rows), cwd=tmp_path
  )
  commands.assert_one_line(status, err, "none of its 3 pictures exists (0.png")


def test_a_workdir_of_another_config(tmp_path):
  from vlp_jax import config

  workdir = tmp_path / "run"
  workdir.mkdir()
  other = config.load("configs/coca.py:debug", ["seed=7"])
  config.save(other, workdir / "config.json")
  status, _, err = commands.run_here(
    "main", DEBUG, f"--workdir={workdir}", cwd=tmp_path
  )
  commands.assert_one_line(status, err, "seed: 7 -> 0")


def test_a_folder_that_cannot_be_written(tmp_path):
  # A file where a folder is to be made: root may write anywhere else.
  blocked = tmp_path / "file"
  blocked.touch()
  status, _, err = commands.run_here(
    "main", DEBUG, f"--workdir={blocked / 'run'}", cwd=tmp_path
  )
  commands.assert_one_line(status, err, os.fspath(blocked))


def test_evaluate_and_export_without_a_run(tmp_path):
  for command in ("evaluate", "export"):
    status, _, err = commands.run_here(
      command, f"--workdir={tmp_path}", cwd=tmp_path
    )
    commands.assert_one_line(status, err, "config.json")
