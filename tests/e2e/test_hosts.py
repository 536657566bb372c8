"""Whole runs in two processes: they stop, resume, and end together."""

import json
import re
import signal
import time

import pytest

from tests import toys
from tests.e2e import commands

CONFIG = "configs/clip.py:debug"


def _start(module, *args, cwd, count=2):
  """Starts a command in `count` processes of two devices."""
  port = toys.free_port()
  return [
    commands.start(
      module,
      *args,
      cwd=cwd,
      JAX_NUM_CPU_DEVICES="2",
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES=str(count),
      JAX_PROCESS_ID=str(number),
    )
    for number in range(count)
  ]


def _finish(processes):
  """Returns (status, stdout, stderr) of each."""
  try:
    ends = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [
    (process.returncode, *end)
    for process, end in zip(processes, ends, strict=True)
  ]


def _train(workdir, *more):
  return [
    "main",
    f"--config={CONFIG}",
    f"--workdir={workdir}",
    *commands.SMALL,
    *more,
  ]


def _wait_for_a_step(workdir, processes):
  metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
  while not (metrics.exists() and metrics.read_text()):
    assert all(process.poll() is None for process in processes)
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _words(text):
  """Standard output without what Gloo prints, from threads that interleave.

  They write piece by piece, so that a number may stand alone.
  """
  gloo = re.compile(r".*(\[Gloo\]|peer ranks).*|[\s\d]*")
  return [line for line in text.splitlines() if not gloo.fullmatch(line)]


@pytest.fixture(scope="module", autouse=True)
def _made(scenes):
  """So that no process says that it makes them: any of them might."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def finished(folder):
  """A run that nobody has disturbed, and what its processes said."""
  workdir = folder / "undisturbed"
  ends = _finish(_start(*_train(workdir), cwd=folder))
  assert [status for status, _, _ in ends] == [0, 0], ends
  return workdir, ends


@pytest.mark.slow
def test_only_the_first_process_speaks(finished):
  workdir, ((_, first, _), (_, second, second_err)) = finished
  assert "eval/retrieval/i2t_r1" in first and "on 4 x cpu" in first
  assert not _words(second) and not second_err
  assert len(list(workdir.glob("events.*"))) == 1
  assert (workdir / "pictures" / "loss_curves.png").exists()


@pytest.mark.slow
def test_one_process_of_as_many_devices_starts_alike(finished, folder):
  """After updates by AdamW, rounding decides; before, it does not."""
  workdir = folder / "one"
  status, _, err = commands.run(
    *_train(workdir, *commands.no_evaluations(CONFIG)),
    cwd=folder,
    JAX_NUM_CPU_DEVICES="4",
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  assert status == 0, err
  one, several = (commands.lines(path) for path in (workdir, finished[0]))
  expected = {k: v for k, v in one[0].items() if k.startswith("train/")}
  assert len(expected) > 5
  for name, value in expected.items():
    assert several[0][name] == pytest.approx(value, rel=1e-5), name
  a, b = (commands.results(path) for path in (workdir, finished[0]))
  assert a["step"] == b["step"]
  assert one[-1]["train/loss"] == pytest.approx(
    next(x for x in reversed(several) if "train/loss" in x)["train/loss"],
    rel=1e-3,
  )


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_they_resume(finished, folder):
  workdir = folder / "preempted"
  args = _train(workdir, "--config.checkpoint.every_steps=0")
  processes = _start(*args, cwd=folder)
  _wait_for_a_step(workdir, processes)
  processes[1].send_signal(signal.SIGTERM)
  ends = _finish(processes)
  statuses = [status for status, _, _ in ends]
  if statuses == [0, 0]:
    pytest.skip("the run ended before the signal reached it")
  assert statuses == [75, 75], ends
  saved = [
    next(line for line in err.splitlines() if "saved step" in line)
    for _, _, err in ends
  ]
  assert saved[0] == saved[1]
  (checkpoint,) = (workdir / "checkpoints").iterdir()
  assert f"saved step {checkpoint.name} in" in saved[0]
  ends = _finish(_start(*args, cwd=folder))
  assert [status for status, _, _ in ends] == [0, 0], ends
  _assert_equal_runs(workdir, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_ends_the_others(finished, folder, lost):
  workdir = folder / f"lost{lost}"
  args = _train(workdir)
  processes = _start(*args, cwd=folder)
  _wait_for_a_step(workdir, processes)
  processes[lost].kill()
  begun = time.monotonic()
  processes[1 - lost].wait(timeout=600)
  seconds = time.monotonic() - begun
  status, _, err = _finish(processes)[1 - lost]
  assert seconds < 60, err
  if status != 0:  # JAX's own end, where its thread was first
    assert status in (69, -signal.SIGABRT), err
    assert "another host has ended" in err or "another task died" in err
  ends = _finish(_start(*args, cwd=folder))
  assert [status for status, _, _ in ends] == [0, 0], ends
  _assert_equal_runs(workdir, finished[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(finished, folder):
  workdir = folder / "damaged"
  args = _train(workdir, "--config.checkpoint.keep=2")
  ends = _finish(_start(*args, cwd=folder))
  assert [status for status, _, _ in ends] == [0, 0], ends
  (workdir / "results.json").unlink()
  commands.flip_bit(workdir / "checkpoints" / "6")
  ends = _finish(_start(*args, cwd=folder))
  assert 75 in [status for status, _, _ in ends], ends
  assert any("6 is damaged" in err for _, _, err in ends)
  assert {x.name for x in (workdir / "checkpoints").iterdir()} == {
    *("4", "6.damaged")
  }
  ends = _finish(_start(*args, cwd=folder))
  assert [status for status, _, _ in ends] == [0, 0], ends
  _assert_equal_runs(workdir, finished[0])


@pytest.mark.slow
def test_evaluate_and_export(finished, folder):
  workdir, _ = finished
  for module in ("evaluate", "export"):
    args = [module, f"--workdir={workdir}"]
    first, second = _finish(_start(*args, cwd=folder))
    assert first[0] == second[0] == 0, (first, second)
    assert _words(first[1]) and not _words(second[1])
  values = json.loads((workdir / "evaluation_6.json").read_text())
  assert values == commands.results(workdir)["metrics"]
  import vlp_jax

  model = vlp_jax.load(workdir / "export")
  assert model.encode_text(["a red circle"]).shape == (1, 96)


@pytest.mark.slow
def test_a_visual_tokenizer_is_fitted_once_for_all(folder):
  processes = _start(
    "main",
    "--config=configs/simla.py:debug",
    f"--workdir={folder / 'simla'}",
    *commands.SMALL,
    "--config.total_steps=2",
    *commands.no_evaluations("configs/simla.py:debug"),
    cwd=folder,
  )
  ends = _finish(processes)
  assert [status for status, _, _ in ends] == [0, 0], ends


def test_mistakes_end_in_one_line(tmp_path):
  """Before anybody waits for anybody."""
  status, _, err = commands.run(
    "main",
    f"--config={CONFIG}",
    f"--workdir={tmp_path / 'run'}",
    cwd=tmp_path,
    JAX_NUM_PROCESSES="2",
  )
  hint = "but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"
  commands.assert_one_line(status, err, hint)


def _assert_equal_runs(resumed, straight):
  """Compares all that two runs have left, to the bit."""
  a, b = commands.results(resumed), commands.results(straight)
  assert a["params_sha256"] == b["params_sha256"]
  assert a["metrics"] == b["metrics"]
  assert commands.lines(resumed) == commands.lines(straight)
