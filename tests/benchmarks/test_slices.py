"""The table of slices, without compiling."""

import subprocess
import sys

import pytest

from benchmarks import slices

REPORT = {
  "batch_size": 512,
  "memory": 2**31,
  "fits": True,
  "operations": 3e12,
  "model_operations": 2e12,
  "seconds": {
    **{"operations": 0.02, "collectives": 0.01},
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
  cells = ("512", "2.0 of 16", "1.50", "10 ms (50% of operations)", "50%")
  (line,) = (x for x in told.splitlines() if "10 ms" in x)
  assert all(cell in line for cell in cells)
  with pytest.raises(SystemExit):
    slices.main()  # again: what is there is kept
  assert compiled == [crashing, other, crashing]
