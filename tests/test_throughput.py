"""Speed and what time is spent on, by a clock that passes when told."""

import os
import subprocess
import sys
import time

import pytest

from vlp_jax import chips, throughput


class Clock:
  """Time that passes when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_rates():
  clock = Clock()

  def model_flops():
    clock.now += 1000.0  # counted once, as no part of a step
    counted.append(3e12)
    return counted[0]

  counted = []
  speed = throughput.Throughput(8, model_flops, 1e13, clock, age=10.0)

  def step(wait, compute):
    with speed.waiting():
      clock.now += wait
    clock.now += compute
    speed.step()

  step(1.0, 60.0)  # compiles
  assert speed.rates() == {"time/restart_seconds": 71.0}
  assert speed.seconds_per_step() is None
  for _ in range(4):
    step(0.5, 1.5)
    with speed.paused("evaluating"):
      clock.now += 100.0
    with speed.paused("saving"):
      clock.now += 17.75
  # 10 s before the loop, 61 s of a first step, 4 of 119.75 s.
  assert speed.rates() == {
    "time/examples_per_second": 4.0,
    "time/model_tflops_per_second": 1.5,
    "time/mfu": 0.15,
    "time/data_wait": 0.25,
    "time/checkpoint_stall": 4 * 17.75 / (61 + 4 * 119.75),
    "time/goodput": 8 / 550,
  }
  step(0.0, 1.0)
  assert len(counted) == 1
  assert speed.rates() == {
    "time/examples_per_second": 8.0,
    "time/model_tflops_per_second": 3.0,
    "time/mfu": 0.3,
    "time/data_wait": 0.0,
    "time/checkpoint_stall": 0.0,
    "time/goodput": 9 / 1551,
  }
  assert speed.seconds_per_step() == 9 / 5
  assert speed.rates() == {}


def test_utilisation_needs_a_known_chip():
  clock = Clock()
  speed = throughput.Throughput(8, clock=clock)
  for _ in range(2):
    clock.now += 1
    speed.step()
  assert "time/mfu" not in speed.rates()
  assert chips.get("cpu") is None
  assert chips.get("TPU v5 lite").flops == 197e12


def test_chips_are_plausible():
  """Whatever the unit of a data sheet was."""
  for name, chip in chips.CHIPS.items():
    assert 2e14 <= chip.flops * 1.02 <= 3e15, name
    assert 15e9 < chip.memory < 250e9, name
    assert 100 < chip.flops / chip.bandwidth < 650, name


@pytest.mark.parametrize(
  "name, teraflops, both_ways",
  [
    ("TPU v4", 275, 600),
    ("TPU v5 lite", 197, 400),
    ("TPU v5", 459, 1200),
    ("TPU v6 lite", 918, 800),
    ("TPU7x", 2307 / 2, 600),
    ("NVIDIA A100-SXM4-80GB", 312, 600),
    ("NVIDIA H100 80GB HBM3", 989.5, 900),
    ("NVIDIA H200", 989.5, 900),
    ("NVIDIA B200", 2250, 1800),
  ],
)
def test_chips_are_those_of_data_sheets(name, teraflops, both_ways):
  """Which give GB/s of all links in both directions, or bits in one."""
  chip = chips.get(name)
  assert chip.flops == pytest.approx(1e12 * teraflops)
  assert 2 * chip.links * chip.link == pytest.approx(1e9 * both_ways)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="not Linux")
def test_a_process_knows_its_age():
  code = "from vlp_jax.throughput import process_age; print(process_age())"
  begun = time.monotonic()
  run = subprocess.run(
    [sys.executable, "-c", f"import time; time.sleep(0.5); {code}"],
    check=True,
    capture_output=True,
    text=True,
  )
  assert 0.45 < float(run.stdout) < time.monotonic() - begun + 0.05
  assert throughput.process_age() > float(run.stdout)
