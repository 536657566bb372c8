"""Shares of a run, by hand; and how a run is read."""

import json
import sys

import pytest

from benchmarks import startup


def test_stalls_count_by_their_time(monkeypatch, tmp_path):
  def run(*_):
    yield 10.0, {"train/loss": 1.0}
    yield 20.0, {"time/checkpoint_stall": 0.9}  # of a time that nobody knows
    yield 30.0, {"time/checkpoint_stall": 0.1}
    yield 60.0, {"time/checkpoint_stall": 0.02}

  monkeypatch.setattr(startup, "run", run)
  got = startup.stall(tmp_path, {}, 0)
  assert got == pytest.approx((10 * 0.1 + 30 * 0.02) / 40)


def test_lines_are_read_when_they_are_whole(monkeypatch, tmp_path):
  # In the place of a run: writes a line in two parts.
  program = tmp_path / "run_it.py"
  program.write_text(
    "import pathlib, sys, time\n"
    "workdir = [x for x in sys.argv if 'workdir' in x][0].split('=')[1]\n"
    "pathlib.Path(workdir).mkdir()\n"
    "with open(f'{workdir}/metrics.jsonl', 'w') as file:\n"
    "  for part in ('{\"step\": ', '1}\\n', '{\"step\": 2}\\n'):\n"
    "    print(part, end='', file=file, flush=True)\n"
    "    time.sleep(0.2)\n"
  )
  shim = tmp_path / "python"
  shim.write_text(
    f'#!/bin/sh\nshift 2\nexec {json.dumps(sys.executable)} {program} "$@"\n'
  )
  shim.chmod(0o755)
  monkeypatch.setattr(startup.sys, "executable", str(shim))
  lines = [line for _, line in startup.run(tmp_path, {})]
  assert lines == [{"step": 1}, {"step": 2}]
