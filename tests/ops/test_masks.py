"""Attention masks by enumeration: True = attend."""

import numpy as np
import pytest

from vlp_jax.ops import masks


def test_valid():
  mask = masks.valid(np.array([0, 2, 3]), 3)
  np.testing.assert_array_equal(
    mask, [[False, False, False], [True, True, False], [True, True, True]]
  )


def test_causal():
  expected = [[[column <= row for column in range(4)] for row in range(4)]]
  np.testing.assert_array_equal(masks.causal(4), expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_cls_comes_last(legacy):
  size, lengths = 4, [0, 1, 3, 4]
  mask = masks.causal_with_cls(np.array(lengths), size, legacy=legacy)
  assert mask.shape == (len(lengths), size + 1, size + 1)
  for length, rows in zip(lengths, mask, strict=True):
    for row in range(size):
      # A token sees those up to itself; pads come after all that counts.
      np.testing.assert_array_equal(rows[row], np.arange(size + 1) <= row)
    real = set(range(length))
    # open_clip's keys are shifted by one: the first one is always valid, key
    # j is when token j - 1 is real, and so [CLS] sees the first pad.
    shifted = {0} | {1 + token for token in real}
    expected = shifted if legacy else real | {size}
    assert set(np.flatnonzero(rows[size])) == expected


def test_masks_become_arrays():
  lengths = np.array([0, 2, 3])
  both = masks.dense(masks.Mask(lengths, causal=True), 3)
  np.testing.assert_array_equal(
    both,
    np.tril(np.ones((3, 3), bool)) & (np.arange(3) < lengths[:, None, None]),
  )
  assert masks.dense(masks.Mask(lengths), 3).shape == (3, 1, 3)
  assert masks.dense(masks.Mask(), 3) is None
  assert masks.dense(None, 3) is None
