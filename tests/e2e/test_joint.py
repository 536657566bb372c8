"""A whole run on pictures and clips, and that it resumes."""

import pytest

from tests.e2e import commands

CONSTANT = "--config.schedule.name=constant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


def test_scl_on_pictures_and_clips_resumes_to_the_bit(folder):
  whole, out = commands.train("scl", "whole", CONSTANT, cwd=folder)
  assert "pictures, 16 a step in 50% of the steps" in out
  assert "clips of 4 frames, 16 a step in 50% of the steps" in out
  rest = CONSTANT, *commands.no_evaluations("configs/scl.py:debug")
  # After an odd number of steps: the other stream is next.
  commands.train("scl", "parts", "--config.total_steps=3", *rest, cwd=folder)
  parts, _ = commands.train("scl", "parts", *rest, cwd=folder)
  first, second = commands.results(whole), commands.results(parts)
  assert first["params_sha256"] == second["params_sha256"]
  losses = [
    {
      (line["step"], key): line[key]
      for line in commands.lines(run)
      for key in ("train/loss", "train_clips/loss")
      # A line tells the last loss of each stream that the process has seen.
      if key in line and (line["step"] % 2 == 1) == (key == "train/loss")
    }
    for run in (whole, parts)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 6
  metrics = first["metrics"]
  assert {"eval/retrieval/i2t_r1", "eval/reranking/i2t_r1"} <= set(metrics)
