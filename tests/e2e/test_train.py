"""Whole runs of every config: what they leave, and that they resume."""

import json
import pathlib
import re
import shutil
import signal
import time

import jax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests import toys
from tests.e2e import commands

METHODS = ("clip", "coca", "sycoca")
STEPS = 16
# After `commands.SMALL`: enough steps to be interrupted between them.
LONGER = (
  f"--config.total_steps={STEPS}",
  "--config.checkpoint.every_steps=4",
  "--config.ema.decay=0.9",
)
# What a run needs that evaluates nothing.
NOTHING = (*LONGER, *commands.no_evaluations("configs/sycoca.py:debug"))
METRICS = pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
  """Runs every method's `debug` size once; returns the folders by name.

  SyCoCa's with all that it evaluates, which is all that the others do.
  """

  def train(method):
    less = commands.no_compositional(
      f"configs/{method}.py:debug", but=("retrieval_comp",)
    )
    flags = (*LONGER, *(less if method != "sycoca" else ()))
    return commands.train(method, method, *flags, cwd=folder)[0]

  return {method: train(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(finished, method):
  workdir = finished[method]
  results = commands.results(workdir)
  assert results["step"] == STEPS
  assert re.fullmatch("[0-9a-f]{64}", results["params_sha256"])
  assert results["config"]["method"]["name"] == method
  names = set(results["metrics"])
  expected = {
    *(f"eval/retrieval/{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)),
    *("eval/retrieval/mtr", "eval/retrieval/mir", "eval_comp/retrieval/mtr"),
    *("eval/pointing/accuracy", "eval/zeroshot/top1"),
    *("eval/binding/contrastive", "eval/relation/contrastive"),
  }
  if method != "clip":
    expected |= {"eval/captioning/true", "eval/captioning/exact"}
    expected |= {"eval/binding/captioner", "eval/relation/captioner"}
  assert expected <= names
  chances = {"eval/retrieval/i2t_r1_chance", "eval/pointing/accuracy_chance"}
  assert chances <= names
  metrics = results["metrics"].items()
  ranks = [value for name, value in metrics if "median_rank" in name]
  assert ranks and all(1 <= value <= 64 for value in ranks)
  other = ("cider", "median_rank")
  shares = [v for k, v in metrics if not any(name in k for name in other)]
  assert all(0 <= value <= 1 for value in shares)
  lines = commands.lines(workdir)
  trained = [line for line in lines if "train/loss" in line]
  assert [line["step"] for line in trained] == [*range(1, STEPS + 1)]
  _assert_times(workdir)
  assert (workdir / "config.json").exists()
  assert list((workdir / "checkpoints").iterdir())
  pictures = {path.name for path in (workdir / "pictures").iterdir()}
  assert {"loss_curves.png", "heatmaps.png"} <= pictures
  assert ("reconstruction.png" in pictures) == (method == "sycoca")


def _assert_times(workdir):
  """Where the time went, by names that are documented, as all others are."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  lines = [line for line in map(json.loads, lines) if "train/loss" in line]
  names = {k for line in lines for k in line if not k.startswith("eval")}
  told = set(re.findall("`(t[a-z]+/[a-z0-9_]+)`", METRICS.read_text()))
  assert {name for name in names if "/" in name} <= told
  # A CPU's best is not known.
  times = {name for name in names if name.startswith("time/")}
  assert times == {n for n in told if n.startswith("time/")} - {"time/mfu"}
  restarts = [i for i, x in enumerate(lines) if "time/restart_seconds" in x]
  assert restarts == [0] and lines[0]["time/restart_seconds"] > 1
  later = lines[1:]
  assert all(line["time/model_tflops_per_second"] > 0 for line in later)
  stalls = [line["time/checkpoint_stall"] for line in later]
  assert stalls[0] == 0 and max(stalls) > 0  # every fourth is saved
  shares = [*stalls, *(line["time/goodput"] for line in later)]
  assert all(0 <= share < 1 for share in shares)


@pytest.fixture(scope="module")
def unwatched(folder):
  """A run that evaluates nothing."""
  return commands.train("sycoca", "unwatched", *NOTHING, cwd=folder)[0]


def test_evaluating_leaves_training_alone(finished, unwatched):
  watched = commands.results(finished["sycoca"])["params_sha256"]
  assert commands.results(unwatched)["params_sha256"] == watched


def _like_unwatched(workdir):
  """The flags of a run that evaluates nothing."""
  config = "--config=configs/sycoca.py:debug"
  return config, f"--workdir={workdir}", *commands.SMALL, *NOTHING


def _signal_when(begun, process, number):
  """Sends a signal as soon as something has happened; returns what it said."""
  deadline = time.monotonic() + 300
  while not begun():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(number)
  return process.communicate(timeout=300)[1]


def test_interrupted_runs_go_on_as_if_nothing_had_happened(unwatched, folder):
  """First SIGTERM, which saves and exits with 75, and then SIGKILL."""
  workdir = folder / "interrupted"
  args = _like_unwatched(workdir)
  process = commands.start("main", *args, cwd=folder)
  metrics = workdir / "metrics.jsonl"
  err = _signal_when(
    lambda: metrics.exists() and metrics.read_text(), process, signal.SIGTERM
  )
  assert process.returncode == 75, err
  saved = int(re.search(r"saved step (\d+)", err)[1])
  assert (workdir / "checkpoints" / f"{saved}").exists()
  process = commands.start("main", *args, cwd=folder)
  later = workdir / "checkpoints" / f"{saved // 4 * 4 + 4}"
  _signal_when(later.exists, process, signal.SIGKILL)
  assert not (workdir / "results.json").exists()
  status, _, err = commands.run("main", *args, cwd=folder)
  assert status == 0, err
  _assert_equal_runs(workdir, unwatched)
  resumed, straight = _last_state(workdir), _last_state(unwatched)
  assert {"params", "ema_params", "opt_state", "key"} <= resumed.keys()
  toys.assert_trees_equal(resumed, straight)


def _last_state(workdir):
  """All that the last checkpoint holds."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    state = reader.restore(workdir / "checkpoints" / f"{STEPS}" / "state")
  return state | {"key": jax.random.key_data(state["key"])}


def test_a_flipped_bit_costs_the_last_checkpoint_alone(unwatched, folder):
  """The other faults are in test_faults.py."""
  workdir = folder / "flipped"
  shutil.copytree(unwatched, workdir)
  (workdir / "results.json").unlink()
  commands.flip_bit(workdir / "checkpoints" / f"{STEPS}")
  status, out, err = commands.run("main", *_like_unwatched(workdir), cwd=folder)
  assert status == 0, err
  assert f"{workdir}/checkpoints/{STEPS} is damaged" in err
  assert f"steps {STEPS - 3} to {STEPS}\n" in out
  _assert_equal_runs(workdir, unwatched)


@pytest.mark.slow
def test_bad_records_are_counted_and_stop_a_run(folder):
  """Past their share; allowed more, it goes on as if never stopped."""
  lists = {}
  for name in ("a", "b"):
    (folder / name).mkdir()
    rows = []
    for i in range(20):
      colour = (12 * i, 0, 100 if name == "a" else 200)
      Image.new("RGB", (64, 64), colour).save(folder / name / f"{i}.png")
      row = {"image": f"{i}.png", "caption": f"picture {i} of {name}"}
      rows.append(row | ({"split": "train"} if name == "a" else {}))
    path = folder / name / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lists[str(path)] = 1 if name == "a" else 3
  for i in range(2):
    (folder / "a" / f"{i}.png").write_bytes(b"no picture")

  def train(workdir, *more):
    return commands.run(
      "main",
      "--config=configs/clip.py:debug",
      f"--config.data.mix={json.dumps(lists)}",
      f"--config.data.source={folder / 'b' / 'pairs.jsonl'}",
      f"--workdir={folder / workdir}",
      *commands.SMALL,
      "--config.batch_size=128",
      "--config.total_steps=9",
      "--config.model.vision.depth=1",
      *commands.no_evaluations("configs/clip.py:debug"),
      *more,
      cwd=folder,
    )

  status, _, err = train("strict")
  assert status == 2
  assert "warning: skipped" in err and "Traceback" not in err
  error = err.splitlines()[-1]
  assert error.startswith("error: ") and "data.max_bad=0.01" in error
  assert "of the 1024 records" in error
  for workdir in ("strict", "lenient"):
    status, _, err = train(workdir, "--config.data.max_bad=0.5")
    assert status == 0, err
  _assert_equal_runs(folder / "strict", folder / "lenient")
  trained = [
    line["train/bad_records"]
    for line in commands.lines(folder / "strict")
    if "train/loss" in line
  ]
  assert len(trained) == 9 and trained == sorted(trained)
  # A quarter of 1,152 rows is of `a`, of which about a tenth is bad.
  assert 20 <= trained[-1] <= 36


def test_evaluate_repeats_the_final_numbers(finished, folder):
  workdir = folder / "evaluated"
  shutil.copytree(finished["coca"], workdir)
  status, out, err = commands.run(
    "evaluate", f"--workdir={workdir}", cwd=folder
  )
  assert status == 0, err
  assert "eval/retrieval/i2t_r1" in out
  values = json.loads((workdir / f"evaluation_{STEPS}.json").read_text())
  assert values == commands.results(workdir)["metrics"]


def test_a_checkpoint_of_another_shape(finished, folder):
  workdir = folder / "wider"
  shutil.copytree(finished["clip"], workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["model"]["embed_dim"] = 64
  (workdir / "config.json").write_text(json.dumps(config))
  for command in ("evaluate", "export"):
    status, _, err = commands.run(command, f"--workdir={workdir}", cwd=folder)
    commands.assert_one_line(status, err, "(96, 96) float32 -> (96, 64)")


def test_an_export_is_usable_from_python(finished, folder):
  workdir = finished["coca"]
  status, out, err = commands.run(
    "export", f"--workdir={workdir}", "--format=orbax", cwd=folder
  )
  assert status == 0, err
  assert "vlp_jax.load" in out
  import numpy as np

  import vlp_jax

  model = vlp_jax.load(workdir / "export")
  picture = np.full((70, 64, 3), 200, np.uint8)
  image = model.encode_image([picture, picture])
  text = model.encode_text(["a red circle", "a blue square"])
  assert image.shape == text.shape
  np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
  assert len(model.caption([picture])) == 1


def _assert_equal_runs(resumed, straight):
  """Compares all that two runs have left, to the bit."""
  a, b = commands.results(resumed), commands.results(straight)
  assert a["params_sha256"] == b["params_sha256"]
  assert a["metrics"] == b["metrics"]
  assert commands.lines(resumed) == commands.lines(straight)
