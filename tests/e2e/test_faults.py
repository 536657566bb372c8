"""Faults while a run trains: it goes on, and ends as if there had been none.

  python -m pytest -n 0 -m slow tests/e2e/test_faults.py

prints a table of what was tried. Moments are drawn from a fixed seed.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest
from PIL import Image

from tests.e2e import commands

pytestmark = pytest.mark.slow

# Steps of a few hundredths of a second, saved so often that any moment is near
# a save, and enough of them for all that kills a run on its way.
RUN = (
  "--config=configs/clip.py:debug",
  "--config.total_steps=160",
  "--config.batch_size=4",
  "--config.schedule.warmup_steps=2",
  "--config.checkpoint.every_steps=8",
  "--config.log.every_steps=1",
  "--config.model.vision.depth=1",
  *commands.no_evaluations("configs/clip.py:debug"),
)
PATIENCE = 600  # seconds, where others share the cores
_TMP = ".orbax-checkpoint-tmp"
_FEW = 6  # steps


class Table:
  """What was tried, and how often the run survived."""

  def __init__(self):
    self.rows: dict[str, list[int]] = {}

  def tried(self, fault: str, times: int = 1) -> None:
    self.rows.setdefault(fault, [0, 0])[0] += times

  def survived(self, fault: str) -> None:
    """All that was tried: for the end, where the parameters are compared."""
    self.rows[fault][1] = self.rows[fault][0]

  def __str__(self) -> str:
    rows = [
      f"| {fault} | {tried} | {kept} | {tried - kept} |"
      for fault, (tried, kept) in self.rows.items()
    ]
    head = ["| fault | tried | survived | lost |", "|---|---|---|---|"]
    return "\n".join(head + rows)


@pytest.fixture(scope="module")
def table(request):
  found = Table()
  yield found
  capture = request.config.pluginmanager.get_plugin("capturemanager")
  with capture.global_and_fixture_disabled():
    print(f"\n{found}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def undisturbed(folder):
  """The run to which all others are compared."""
  return _finish(folder / "undisturbed")[0]


@pytest.fixture(scope="module")
def startup(undisturbed, folder):
  """Seconds from a start to the first step, with programs compiled before."""
  begun = time.monotonic()
  process = _until(folder / "measured", "step", 0)
  seconds = time.monotonic() - begun
  process.kill()
  process.communicate()
  return seconds


_started = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
  yield
  while _started:
    _started.pop().kill()


def _start(workdir, *args, **environ):
  arguments = (*RUN, *args, f"--workdir={workdir}")
  process = commands.start("main", *arguments, cwd=workdir.parent, **environ)
  _started.append(process)
  return process


def _finish(workdir, *args, **environ):
  """Runs to the end: (workdir, stderr)."""
  process = _start(workdir, *args, **environ)
  _, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, err
  return workdir, err


def _assert_equal(workdir, undisturbed):
  a, b = commands.results(workdir), commands.results(undisturbed)
  assert a["params_sha256"] == b["params_sha256"]
  assert commands.lines(workdir) == commands.lines(undisturbed)


# --- Moments ----------------------------------------------------------------


def _watch(workdir, moment, amount):
  """Returns a function that tells whether a moment has come.

  Call it before the process starts, and the function until it is True.

  Args:
    workdir: of the run.
    moment: `start`, so many seconds after it, or after a few steps if they
      come first, so that no run ends before; `step`, after so many of its
      steps; `save`, so many seconds after a save has begun.
    amount: of those.
  """
  metrics = workdir / "metrics.jsonl"

  def file_number(path):
    return path.stat().st_ino if path.exists() else None

  def saves():
    return {
      file_number(path) for path in (workdir / "checkpoints").glob(f"*{_TMP}*")
    }

  old_file, old_saves = file_number(metrics), saves()
  begun, base = time.monotonic(), None

  def has_come():
    nonlocal base
    if moment == "start" and time.monotonic() >= begun + amount:
      return True
    if moment == "save":
      if saves() <= old_saves | {None}:
        return False
      time.sleep(amount)
      return True
    if file_number(metrics) in (None, old_file):  # every start makes a new one
      return False
    count = metrics.read_bytes().count(b"\n")
    base = count if base is None else base
    return count >= base + (_FEW if moment == "start" else amount)

  return has_come


def _until(workdir, moment, amount, *args, **environ):
  """Starts a run, and returns it when a moment has come."""
  has_come = _watch(workdir, moment, amount)
  process = _start(workdir, *args, **environ)
  deadline = time.monotonic() + PATIENCE
  while not has_come():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.002)
  return process


def _moments(seed, startup, starts, steps, saves):
  """Draws moments, in random order; `startup` is the seconds that one takes."""
  draw = random.Random(seed)
  found = [("start", startup * draw.uniform(0.02, 1.1)) for _ in range(starts)]
  found += [("step", draw.randint(1, 9)) for _ in range(steps)]
  found += [("save", draw.uniform(0, 0.03)) for _ in range(saves - 1)]
  found += [("save", 0)]
  draw.shuffle(found)
  return found


# --- Faults -----------------------------------------------------------------


def test_sigkill(table, undisturbed, startup, folder):
  workdir = folder / "killed"
  unfinished = 0
  for moment, amount in _moments(0, startup, starts=6, steps=7, saves=7):
    process = _until(workdir, moment, amount)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    unfinished += any((workdir / "checkpoints").glob(f"*{_TMP}*"))
    table.tried("SIGKILL, 7 of 20 during a save")
  assert unfinished
  _finish(workdir)
  _assert_equal(workdir, undisturbed)
  table.survived("SIGKILL, 7 of 20 during a save")


def test_sigterm(table, undisturbed, startup, folder):
  workdir = folder / "terminated"
  for moment, amount in _moments(1, startup, starts=2, steps=4, saves=2):
    process = _until(workdir, moment, amount)
    commands.wait_until_sigterm_is_caught(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    saved = "preempted: saved step" in err
    assert saved or (moment == "start" and "nothing to save" in err), err
    table.tried("SIGTERM")
  _finish(workdir)
  _assert_equal(workdir, undisturbed)
  table.survived("SIGTERM")


def _cut(checkpoint):
  path = commands.data_file(checkpoint)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _half_written(checkpoint):
  files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
  for path in files[::2]:
    path.unlink()


def _not_renamed(checkpoint):
  later = checkpoint.with_name(f"{int(checkpoint.name) + 8}{_TMP}-7")
  shutil.copytree(checkpoint, later)
  _half_written(later)


def _flip_metadata(checkpoint):
  path = checkpoint / "state" / "_METADATA"
  path.write_text(path.read_text().replace("key_type", "key_typd", 1))


@pytest.fixture(scope="module")
def interrupted(folder):
  """A run that was killed on its way, with two checkpoints.

  Or with three: where it was killed before it had removed the oldest.
  """
  workdir = folder / "interrupted"
  process = _until(workdir, "step", 100)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return workdir


@pytest.mark.parametrize(
  "harm",
  [_cut, commands.flip_bit, _flip_metadata, _half_written, _not_renamed],
)
def test_a_damaged_checkpoint(table, undisturbed, interrupted, folder, harm):
  fault = {
    _cut: "last checkpoint truncated",
    commands.flip_bit: "a bit flipped in its arrays",
    _flip_metadata: "a bit flipped in its metadata",
    _half_written: "every second of its files missing",
    _not_renamed: "a half-written checkpoint after it",
  }[harm]
  workdir = folder / harm.__name__
  shutil.copytree(interrupted, workdir)
  steps = [
    path for path in workdir.glob("checkpoints/*") if path.name.isdigit()
  ]
  assert len(steps) in (2, 3)
  last = max(steps, key=lambda path: int(path.name))
  table.tried(fault)
  harm(last)
  _, err = _finish(workdir)
  told = (
    f"checkpoint {last} is damaged" in err and "using the one before" in err
  )
  assert told == (harm is not _not_renamed)
  assert not list(workdir.glob(f"checkpoints/*{_TMP}*"))
  _assert_equal(workdir, undisturbed)
  table.survived(fault)


def test_a_full_disk(table, undisturbed, folder):
  size = sum(
    path.stat().st_size
    for path in undisturbed.glob("checkpoints/160/**/*")
    if path.is_file()
  )
  disk = folder / "disk"
  disk.mkdir()

  def mount(options):
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True).returncode == 0

  # Two checkpoints are kept, and there is no room for a third.
  if not mount(f"size={int(2.5 * size)}"):
    pytest.skip("cannot mount a small file system here")
  try:
    workdir = disk / "run"
    table.tried("full disk while saving")
    process = _start(workdir)
    _, err = process.communicate(timeout=PATIENCE)
    error = [x for x in err.splitlines() if x.strip() and "WARN" not in x]
    commands.assert_one_line(process.returncode, error[-1], "No space left")
    assert len(error) == 1, err
    assert mount(f"remount,size={20 * size}")
    _finish(workdir)
    _assert_equal(workdir, undisturbed)
    table.survived("full disk while saving")
  finally:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_an_embedded_data_set_is_deleted(table, undisturbed, folder):
  """What is open stays readable; the next start makes it again."""
  from vlp_jax.data.builders import scenes

  made = pathlib.Path(scenes.ensure_built("scenes/debug").data_dir)
  data = folder / "data"
  shutil.copytree(made, data / made.relative_to(made.parents[2]))
  workdir = folder / "embedded"
  table.tried("embedded data set deleted")
  process = _until(workdir, "step", 10, TFDS_DATA_DIR=str(data))
  shutil.rmtree(data)
  has_come = _watch(workdir, "save", 0)
  while not has_come():
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  _finish(workdir, TFDS_DATA_DIR=str(data))
  _assert_equal(workdir, undisturbed)
  table.survived("embedded data set deleted")


def test_pictures_are_deleted(table, folder):
  """They have to come back."""
  pictures = folder / "pictures"
  pictures.mkdir()
  rows = []
  for i in range(64):
    Image.new("RGB", (64, 64), (4 * i, 0, 100)).save(pictures / f"{i}.png")
    row = {"image": f"pictures/{i}.png", "caption": f"picture {i}"}
    rows.append(json.dumps(row | {"split": "train"}))
  (folder / "pairs.jsonl").write_text("\n".join(rows))
  source = f"--config.data.source={folder / 'pairs.jsonl'}"
  straight, _ = _finish(folder / "pairs", source)
  workdir = folder / "pairs_deleted"
  table.tried("pictures of a JSONL file deleted")
  process = _until(workdir, "step", 20, source)
  pictures.rename(folder / "away")
  _, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == 2, err
  error = err.splitlines()[-1]
  assert error.startswith("error: ") and "no readable picture" in error
  (folder / "away").rename(pictures)
  _finish(workdir, source)
  _assert_equal(workdir, straight)
  table.survived("pictures of a JSONL file deleted")


_CLOCK = """
import os, time
_time, _time_ns = time.time, time.time_ns
def _back():
  return 86400 * os.path.exists(os.environ["CLOCK_SET_BACK"])
time.time = lambda: _time() - _back()
time.time_ns = lambda: _time_ns() - 10**9 * _back()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_the_clock_is_set_back(table, undisturbed, folder, killed):
  """By a day, as Python's `time` shows it; C++ and the disk keep theirs."""
  place = folder / f"clock_{killed}"
  place.mkdir()
  (place / "sitecustomize.py").write_text(_CLOCK)
  mark = place / "set_back"
  environ = {
    "CLOCK_SET_BACK": str(mark),
    "PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}",
  }
  workdir = place / "run"
  table.tried("clock set back")
  begun = time.monotonic()
  process = _until(workdir, "step", 20, **environ)
  mark.touch()
  if killed:
    has_come = _watch(workdir, "save", 0)
    while not has_come():
      assert process.poll() is None, process.communicate()
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _finish(workdir, **environ)
  else:
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
  seconds = commands.results(workdir)["seconds"]
  assert 0 < seconds < time.monotonic() - begun
  _assert_equal(workdir, undisturbed)
  table.survived("clock set back")
