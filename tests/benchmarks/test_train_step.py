"""Who is compared with whom, and the share of a peak; nothing is timed."""

import argparse

import pytest

from benchmarks import open_clip_peer, train_step
from vlp_jax import config as config_lib


@pytest.mark.parametrize("dtype", train_step.DTYPES)
@pytest.mark.parametrize("size", train_step.SIZES)
def test_sizes(size, dtype):
  options = argparse.Namespace(size=size, batch_size=32, dtype=dtype)
  config = train_step.load_config("coca_base", options, "seed=3")
  config_lib.validate(config)
  assert (config.batch_size, config.seed) == (32, 3)
  assert config.model.dtype == dtype
  assert config.accumulate == 1
  assert config.optimizer.name == "adamw"
  assert config == train_step.load_config("open_clip", options, "seed=3")


@pytest.mark.parametrize(
  ("device", "size", "expected"),
  [
    (
      *("cpu", "tiny"),
      "open_clip open_clip_huge open_clip_compiled coca_base coca_base_devices "
      "coca sycoca_tokens sycoca_input",
    ),
    ("cpu", "b16", "open_clip open_clip_huge open_clip_compiled coca_base"),
    ("cuda", "l14", "open_clip open_clip_compiled coca_base"),
  ],
)
def test_contenders(monkeypatch, device, size, expected):
  asked = []
  monkeypatch.setattr(open_clip_peer, "available", lambda: True)
  monkeypatch.setattr(
    open_clip_peer, "compiles", lambda device: asked.append(device) or True
  )
  options = argparse.Namespace(device=device, size=size)
  assert train_step.contenders(options) == expected.split()
  assert asked == [device]


def test_without_open_clip_ours_are_left(monkeypatch):
  monkeypatch.setattr(open_clip_peer, "available", lambda: False)
  options = argparse.Namespace(device="cuda", size="b16")
  assert train_step.contenders(options) == ["coca_base"]


def test_utilisation():
  options = argparse.Namespace(
    **dict(rounds=3, steps=1, batch_size=8, size="b16"),
    **dict(device="cuda", dtype="bfloat16"),
  )
  facts = {
    "open_clip": dict(parameters=7, gflop=None),
    "coca_base": dict(parameters=7, gflop=500.0, peak_gflop=1000.0),
  }
  seconds = {"open_clip": [2.0, 2.5, 2.0], "coca_base": [1.0, 1.0, 3.0]}
  found = train_step.summarize(options, facts, seconds)
  assert found["rows"]["open_clip"]["utilisation"] == 0.25
  assert found["rows"]["coca_base"]["utilisation"] == 0.5
  assert found["rows"]["coca_base"]["examples_per_s"] == 8
  facts["coca_base"]["peak_gflop"] = None  # nobody has told of a CPU's
  found = train_step.summarize(options, facts, seconds)
  assert found["rows"]["open_clip"]["utilisation"] is None
