"""Whole runs of the methods with a momentum teacher."""

import json
import shutil

import numpy as np
import pytest

import vlp_jax
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
      *("binding/matching_chance", "zeroshot/top1", "alignment/local"),
    )
  }
  assert expected <= set(results["metrics"])
  pictures = {path.name for path in (workdir / "pictures").iterdir()}
  assert {"loss_curves.png", "heatmaps.png"} <= pictures


def test_albef(folder):
  """Its evaluations are SIMLA's; those of the matching head are enough."""
  others = commands.no_evaluations(
    "configs/albef.py:debug", but=("reranking_test",)
  )
  workdir, _ = commands.train("albef", "albef", *others, cwd=folder)
  assert {"eval/reranking/i2t_r1", "eval/reranking/t2i_r10"} <= set(
    commands.results(workdir)["metrics"]
  )
  trained = [x for x in commands.lines(workdir) if "train/loss" in x]
  assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]


# Queues of four batches, the end of which a run of six comes round.
QUEUE = "--config.method.queue_size=64"
CONSTANT = "--config.schedule.name=constant"


@pytest.fixture(scope="module")
def simla(folder):
  """A whole run: its folder, and what it has printed."""
  less = commands.no_compositional(
    "configs/simla.py:debug", but=("binding_comp",)
  )
  return commands.train("simla", "simla", CONSTANT, QUEUE, *less, cwd=folder)


def test_simla(simla):
  workdir, out = simla
  assert_complete(workdir)
  shown = out.partition("keywords of captions")[2].splitlines()
  assert sum("; adds " in line for line in shown) == 4


@pytest.mark.slow
def test_simla_resumes_with_its_queues_teacher_and_tokenizer(simla, folder):
  rest = CONSTANT, QUEUE, *commands.no_evaluations("configs/simla.py:debug")
  commands.train("simla", "parts", "--config.total_steps=4", *rest, cwd=folder)
  parts, _ = commands.train("simla", "parts", *rest, cwd=folder)
  first, second = commands.results(simla[0]), commands.results(parts)
  assert first["params_sha256"] == second["params_sha256"]
  losses = [
    [line["train/loss"] for line in commands.lines(x) if "train/loss" in line]
    for x in (simla[0], parts)
  ]
  assert losses[0] == losses[1]


def test_evaluating_the_teacher(simla, folder):
  workdir = folder / "evaluated"
  shutil.copytree(simla[0], workdir)
  others = commands.no_evaluations(
    "configs/simla.py:debug", but=("binding_comp",)
  )
  status, out, err = commands.run(
    "evaluate", f"--workdir={workdir}", "--ema", *others, cwd=folder
  )
  assert status == 0, err
  (path,) = workdir.glob("evaluation_6_ema_*.json")
  values = json.loads(path.read_text())
  name = "eval_comp/binding/matching"
  assert name in values and name in out


def test_an_export_matches_pictures_and_texts(simla, folder):
  status, _, err = commands.run("export", f"--workdir={simla[0]}", cwd=folder)
  assert status == 0, err
  model = vlp_jax.load(simla[0] / "export")
  pictures = [np.full((70, 64, 3), shade, np.uint8) for shade in (40, 200)]
  texts = ["a red circle", "a blue square", "a star"]
  scores = model.match(pictures, texts)
  assert scores.shape == (2, 3) and ((scores > 0) & (scores < 1)).all()
  for i, picture in enumerate(pictures):
    for j, text in enumerate(texts):
      alone = model.match([picture], [text])
      np.testing.assert_allclose(alone, [[scores[i, j]]], rtol=1e-4)
  assert len(np.unique(scores)) == 6
