"""The least that chips must send, by hand."""

import pytest

from benchmarks import scaling


def test_the_least_that_is_sent():
  # Four chips share weights of 100 numbers: 200 bytes in bfloat16, of which
  # each sends three quarters to the others, three times; of the gradient of a
  # table of 30, once. Embeddings: 32 of 10 numbers of either side, 2,560 bytes,
  # out and back.
  assert scaling.least(100, 30, (1, 4, 1), 32, 10) == pytest.approx(
    3 * 0.75 * 200 + 0.75 * 60 + 2 * 0.75 * 2560
  )
  # Copies alone: twice the gradient, but for a chip's own part.
  assert scaling.least(70, 30, (8, 1, 1), 0, 10) == pytest.approx(
    2 * 7 / 8 * 200
  )
  assert scaling.least(100, 30, (1, 1, 1), 32, 10) == 0


def test_a_line_of_the_table():
  report = dict(
    chips=4,
    mesh=(1, 4, 1),
    parameters=10**6,
    table=10**5,
    batch_size=32,
    embed_dim=512,
    sent={"all-gather": 4e6, "all-to-all": 1e6},
  )
  line = scaling.cells("v5e:2x2", report)
  assert len(line) == len(scaling.HEADS)
  assert line[4:] == ["5 MB", "4 MB", "1.14", "4, 0, 0, 1 MB"]
