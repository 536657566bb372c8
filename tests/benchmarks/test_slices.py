"""The table of slices, without compiling."""

import subprocess
import sys

import pytest

from benchmarks import rounds, slices

REPORT = {
  "batch_size": 4096,
  "accumulate": 2,
  "remat": "dots",
  "memory": 2**31,
  "fits": True,
  "operations": 3e12,
  "model_operations": 2e12,
  "seconds": {
    **{"operations": 0.02, "hbm": 0.015, "instructions": 1.125},
    "collectives": 0.01,
    **{"model": 0.015, "step": 0.03},
  },
}


def test_a_row_that_crashes_the_compiler_is_left_out(
  tmp_path, monkeypatch, capsys
):
  crashing, other = slices.ROWS[:2]
  monkeypatch.setattr(slices, "ROWS", (crashing, other))
  compiled = []

  def compile_row(row):
    compiled.append(row)
    if row == crashing:
      raise subprocess.CalledProcessError(-11, "aot")
    return {"reports": [REPORT]}

  monkeypatch.setattr(slices, "compile_row", compile_row)
  monkeypatch.setattr(sys, "argv", ["slices", f"--output={tmp_path}"])
  with pytest.raises(SystemExit, match="not compiled: v5e_16x16_sycoca_b16;"):
    slices.main()
  told = capsys.readouterr().out
  assert "left out: its compiler ended with -11" in told
  line = (
    "v5e:16x16 | sycoca.py:l14 | 16, 16, 1 | 4,096 in 2 | dots | 2.0 of 16 | "
    "1.50 | 20.0 ms | 15.0 ms | 1,125 ms | 10.0 ms, 50% | 50%"
  )
  assert f"| {line} |\n" in told
  with pytest.raises(SystemExit):
    slices.main()  # again: what is there is kept
  assert compiled == [crashing, other, crashing]


def test_what_does_not_fit_fills_a_line():
  cells = slices.cells(slices.ROWS[0], REPORT | {"fits": False})
  assert "does not fit" in cells
  assert len(cells) == len(slices.HEADS)


def test_what_is_kept_is_of_the_same_command(tmp_path, capsys):
  path, made = tmp_path / "rows" / "one.json", []

  def make():
    made.append(1)
    return {"count": len(made)}

  assert rounds.once(path, "aot --mesh=1,1,1", make) == {"count": 1}
  assert rounds.once(path, "aot --mesh=1,1,1", make) == {"count": 1}
  assert not capsys.readouterr().out
  assert rounds.once(path, "aot --mesh=2,1,1", make) == {"count": 2}
  assert "is of aot --mesh=1,1,1" in capsys.readouterr().out
  assert "jax " in rounds.with_versions("aot")
