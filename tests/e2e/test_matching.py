"""Whole runs of the methods with a momentum teacher."""

import pytest

from tests.e2e import commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


def assert_complete(workdir):
  results = commands.results(workdir)
  expected = {
    f"eval/{kind}"
    for kind in (
      *("retrieval/i2t_r1", "reranking/i2t_r1", "reranking/t2i_r10"),
      *("pointing/accuracy", "binding/matching", "relation/matching"),
      *("binding/matching_chance", "zeroshot/top1"),
    )
  }
  assert expected <= set(results["metrics"])
  pictures = {path.name for path in (workdir / "pictures").iterdir()}
  assert {"loss_curves.png", "heatmaps.png"} <= pictures


def test_albef(folder):
  workdir, _ = commands.train("albef", "albef", cwd=folder)
  assert_complete(workdir)


def test_simla_resumes_with_its_queues_teacher_and_tokenizer(folder):
  constant = "--config.schedule.name=constant"
  whole, out = commands.train("simla", "whole", constant, cwd=folder)
  assert_complete(whole)
  shown = out.partition("keywords of captions")[2].splitlines()
  assert sum("; adds " in line for line in shown) == 4
  rest = constant, *commands.no_evaluations("configs/simla.py:debug")
  commands.train("simla", "parts", "--config.total_steps=4", *rest, cwd=folder)
  parts, _ = commands.train("simla", "parts", *rest, cwd=folder)
  first, second = commands.results(whole), commands.results(parts)
  assert first["params_sha256"] == second["params_sha256"]
  losses = [
    [line["train/loss"] for line in commands.lines(x) if "train/loss" in line]
    for x in (whole, parts)
  ]
  assert losses[0] == losses[1]
