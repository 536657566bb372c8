"""A whole run on pictures and clips, and that such a run resumes."""

import numpy as np
import pytest

import vlp_jax
from tests.data.test_clips import animation
from tests.e2e import commands

CONSTANT = "--config.schedule.name=constant"
SMALL = (
  *("--config.batch_size=8", "--config.clips.batch_size=4"),
  *("--config.clips.num_frames=2", "--config.clips.share=0.4"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def scl(folder):
  """A whole run: its folder, and what it has printed."""
  less = commands.no_compositional(
    "configs/scl.py:debug", but=("pointing_comp",)
  )
  return commands.train(
    "scl", "scl", "--config.total_steps=2", *less, cwd=folder
  )


def test_scl(scl):
  workdir, out = scl
  assert "pictures, 16 a step in 50% of the steps" in out
  assert "clips of 4 frames, 16 a step in 50% of the steps" in out
  assert out.count("attention: ") == 1
  assert "attention: xla (cpu)\n" in out
  expected = {
    *("eval/retrieval/i2t_r1", "eval/reranking/t2i_median_rank"),
    *("eval/alignment/local", "eval_comp/pointing/accuracy"),
    *("eval_clips/retrieval/i2t_r1", "eval_clips/reranking/t2i_r10"),
    *("eval_clips/motion/matching", "eval_clips/binding/contrastive"),
  }
  assert expected <= set(commands.results(workdir)["metrics"])
  last = commands.lines(workdir)[1]
  assert {"train/mvsc", "train_clips/mvsc"} <= set(last)
  pictures = {path.name for path in (workdir / "pictures").iterdir()}
  both = ("heatmaps", "retrieval_image_to_text", "retrieval_text_to_image")
  assert {f"{name}{x}.png" for name in both for x in ("", "_clips")} <= pictures


def test_an_export_reads_clips(scl, folder):
  status, _, err = commands.run("export", f"--workdir={scl[0]}", cwd=folder)
  assert status == 0, err
  path = scl[0] / "export" / "config.json"
  text = path.read_text()
  assert '"attention": "auto"' in text
  path.write_text(text.replace('"attention": "auto"', '"attention": "cudnn"'))
  model = vlp_jax.load(scl[0] / "export")
  draw = np.random.default_rng(0)
  frames = list(draw.integers(0, 256, (4, 60, 64, 3), dtype=np.uint8))
  # A file, whose colours GIF rounds; its frames; and these with some between.
  films = [animation(count=4), frames, [x for x in frames for _ in range(3)]]
  pixels = model.preprocess_clips(films)
  assert pixels.shape == (3, 4, 48, 48, 3)
  image = model.encode_clip(films)
  np.testing.assert_array_equal(image[1], image[2])
  assert np.abs(image[0] - image[1]).max() > 1e-3
  reverse = model.encode_clip([frames[::-1]])
  assert np.abs(reverse - image[1]).max() > 1e-5  # frames have an order
  texts = ["a red circle grows", "a star stays"]
  scores = model.match_clips(films, texts)
  assert scores.shape == (3, 2) and ((scores > 0) & (scores < 1)).all()
  assert model.encode_image(frames).shape == (4, image.shape[1])


@pytest.mark.slow
def test_a_run_on_pictures_and_clips_resumes_to_the_bit(folder):
  rest = CONSTANT, *SMALL, *commands.no_evaluations("configs/scl.py:debug")
  whole, _ = commands.train("scl", "whole", *rest, cwd=folder)
  # Steps are on p c p p c p: the second part begins with clips.
  commands.train("scl", "parts", *rest, "--config.total_steps=4", cwd=folder)
  parts, _ = commands.train("scl", "parts", *rest, cwd=folder)
  first, second = commands.results(whole), commands.results(parts)
  assert first["params_sha256"] == second["params_sha256"]
  # A line tells the last loss of each stream that the process has seen.
  lines = [commands.lines(run) for run in (whole, parts)]
  for name, steps in (("train", {1, 3, 4, 6}), ("train_clips", {2, 5})):
    losses = [
      {line["step"]: line.get(f"{name}/loss") for line in run[:6]}
      for run in lines
    ]
    for step in steps:
      assert losses[0][step] == losses[1][step] is not None
