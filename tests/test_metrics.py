"""Files that a run leaves, its speed, its progress and its table."""

import json
import pathlib
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboardX.proto import event_pb2

from vlp_jax import config as config_lib
from vlp_jax import metrics
from vlp_jax.errors import UserError


def read_lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def read_events(workdir):
  """Reads TFRecords: length, its checksum, an Event, its checksum."""
  events = []
  for path in sorted(workdir.glob("events*")):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return events


def test_lines_and_events(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(1, {"train/loss": jnp.float32(2.5), "train/itc": np.nan})
  assert read_lines(tmp_path) == [  # at once, not at the end
    {"step": 1, "train/loss": 2.5, "train/itc": None}
  ]
  writer.write(2, {"eval/retrieval/i2t_r1": 0.5})
  writer.close()
  assert read_lines(tmp_path)[1] == {"step": 2, "eval/retrieval/i2t_r1": 0.5}
  values = [
    (event.step, value.tag, value.simple_value)
    for event in read_events(tmp_path)
    for value in event.summary.value
  ]
  assert values[0] == (1, "train/loss", 2.5)
  assert values[2] == (2, "eval/retrieval/i2t_r1", 0.5)


def write_steps(workdir, start, end):
  writer = metrics.Writer(workdir, start)
  for step in range(start + 1, end + 1):
    writer.write(step, {"train/loss": 1 / step})
    if step % 2 == 0:
      writer.write(step, {"eval/top1": step / 10})
  writer.close()


@pytest.mark.parametrize("tail", ["", '{"step": 6, "train/lo', "\n", "[]\n"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, tail):
  straight, resumed = tmp_path / "straight", tmp_path / "resumed"
  for folder in (straight, resumed):
    folder.mkdir()
  write_steps(straight, 0, 8)
  write_steps(resumed, 0, 5)  # killed after step 5, perhaps within a line
  with (resumed / "metrics.jsonl").open("a") as file:
    file.write(tail)
  write_steps(resumed, 4, 8)  # the last checkpoint was of step 4
  name = "metrics.jsonl"
  assert (resumed / name).read_bytes() == (straight / name).read_bytes()
  sessions = [event for event in read_events(resumed) if event.step == 5]
  starts = event_pb2.SessionLog.START
  assert any(event.session_log.status == starts for event in sessions)


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = metrics.Writer(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.close()
  with metrics.Progress(1, 8) as progress:
    progress.update(1, 1.0)
  metrics.print_table({"a": 1.0})
  metrics.write_results(
    tmp_path,
    config=config_lib.default_config(),
    step=1,
    params_sha256="",
    seconds=1.0,
    metrics={},
  )
  assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no device")
def test_a_full_disk_is_told_in_one_line(tmp_path):
  writer = metrics.Writer(tmp_path)
  with open("/dev/full", "ab", buffering=0) as full:
    writer._file = full
    with pytest.raises(UserError, match=r"metrics.jsonl \(No space left"):
      writer.write(1, {"loss": 1.0})
  writer.close()
  with pytest.raises(UserError, match="No such file"):
    metrics.Writer(tmp_path / "none")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no device")
def test_events_on_a_full_disk_are_told_too(tmp_path, monkeypatch):
  """And nothing waits for what a thread cannot write."""
  writer = metrics.Writer(tmp_path)
  with open("/dev/full", "ab", buffering=0) as full:
    records = writer._events._py_recordio_writer
    monkeypatch.setattr(records, "_writer", full)
    for step in range(1, 20):
      with pytest.raises(UserError, match="No space left"):
        writer.write(step, {"loss": 1.0})
    monkeypatch.undo()
  writer.close()


def test_progress_without_a_terminal(capsys):
  with metrics.Progress(400, 8, start=100, interval=3600.0) as progress:
    for step in range(101, 401):
      with progress.waiting():
        pass
      progress.update(step, 1.25)
      with progress.pause("evaluating"):
        pass
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2  # the first, and the end
  assert lines[0] == "step 101/400  loss 1.250"
  assert lines[1].startswith("step 400/400  loss 1.250  ")
  assert lines[1].endswith(" examples/s  0:00:00 left")


def test_progress_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  with metrics.Progress(3, 8) as progress:
    for step in (1, 2, 3):
      progress.update(step, 2.0)
  with pytest.raises(KeyboardInterrupt), metrics.Progress(3, 8):
    raise KeyboardInterrupt  # the bar lets go of the terminal
  out = capsys.readouterr().out
  assert "step 3/3  loss 2.000" in out and "examples/s" in out


def test_params_sha256():
  params = {"b": {"w": jnp.arange(8.0).reshape(4, 2)}, "a": jnp.int32(3)}
  digest = metrics.params_sha256(params)
  assert len(digest) == 64
  assert digest == metrics.params_sha256(dict(reversed(params.items())))
  assert digest == metrics.params_sha256(jax.tree.map(np.asarray, params))
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec())
  assert digest == metrics.params_sha256(jax.device_put(params, sharding))
  for other in (
    {**params, "a": jnp.int32(4)},
    {**params, "a": jnp.float32(3)},
    {**params, "b": {"w": params["b"]["w"].T}},
    {**params, "b": {"w": params["b"]["w"].reshape(2, 4)}},
    {"b": params["b"], "c": params["a"]},
    jax.tree.map(lambda x: -x * 0, params),
  ):
    assert digest != metrics.params_sha256(other)


def test_results(tmp_path):
  config = config_lib.default_config()
  metrics.write_results(
    tmp_path,
    config=config,
    step=7,
    params_sha256="abc",
    seconds=1.5,
    metrics={"eval/retrieval/t2i_r1": 0.5, "eval/captioning/true": np.nan},
  )
  results = json.loads((tmp_path / "results.json").read_text())
  assert results.pop("config") == json.loads(config.to_json())
  assert results == {
    "step": 7,
    "params_sha256": "abc",
    "seconds": 1.5,
    "metrics": {"eval/retrieval/t2i_r1": 0.5, "eval/captioning/true": None},
  }
  assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_table(capsys):
  metrics.print_table(
    {
      "eval/retrieval/i2t_r1": 0.5781,
      "eval/retrieval/i2t_r1_chance": 0.001,
      "eval/retrieval/mtr": 12.5,
      "eval/binding/contrastive": 0.75,
      "eval/binding/contrastive_chance": 0.5,
    }
  )
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  rows = [row for row in rows if row and "/" in row[0]]
  assert rows == [
    ["eval/binding/contrastive", "0.750", "0.500"],
    ["eval/retrieval/i2t_r1", "0.578", "0.001"],
    ["eval/retrieval/mtr", "12.500"],
  ]
  metrics.print_table({})
  assert not capsys.readouterr().out
