"""DALL-E's encoder against NumPy, at small size, and its size as released."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import dalle_reference as reference
from vlp_jax.models.dalle import DalleBlock, DalleEncoder


@pytest.mark.parametrize("blocks", [1, 2])
def test_numpy(blocks):
  encoder = DalleEncoder(width=8, blocks=blocks, vocab_size=11)
  params = reference.parameters(encoder, 16, 24, 3)
  pixels = np.random.default_rng(0).random((2, 16, 24, 3), np.float32)
  logits = toys.jit(encoder.apply)({"params": params}, pixels)
  assert logits.shape == (2, 2, 3, 11) and logits.dtype == jnp.float32
  expected = np.stack(
    [reference.encode(params, picture, blocks) for picture in pixels]
  )
  assert 0.1 < expected.std() < 10
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [8, 16])
def test_a_block_adds_a_64th(width):
  """Beside an identity, or beside a matrix where the width changes."""
  module = DalleBlock(width)
  params = reference.parameters(module, 5, 7, 8)
  assert ("id_path" in params) == (width != 8)
  x = np.random.default_rng(0).normal(size=(1, 5, 7, 8)).astype(np.float32)
  out = toys.jit(module.apply)({"params": params}, x)[0]
  expected = reference.block(params, np.float64(x[0]))
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  # By the last bias alone: it counts 1/64 of itself.
  params["conv_4"]["bias"] = params["conv_4"]["bias"] + 64
  more = toys.jit(module.apply)({"params": params}, x)[0]
  np.testing.assert_allclose(more - out, 1, atol=1e-5)


def test_borders_are_padded_with_zeros():
  """A 7 x 7 kernel of ones counts the pixels that it covers."""
  encoder = DalleEncoder(width=8, blocks=1, vocab_size=5)
  params = jax.tree.map(np.zeros_like, reference.parameters(encoder, 8, 8, 3))
  params["input"]["kernel"] = np.ones_like(params["input"]["kernel"])
  _, state = encoder.apply(
    {"params": params},
    np.ones((1, 8, 8, 3), np.float32),
    capture_intermediates=lambda module, _: module.name == "input",
  )
  covered = state["intermediates"]["input"]["__call__"][0][0, :, :, 0]
  count = np.array([4, 5, 6, 7, 7, 6, 5, 4])
  # A white pixel is 0.9 in each of three channels; what is outside is 0.
  np.testing.assert_allclose(covered, 2.7 * np.outer(count, count), rtol=1e-5)


def test_as_released():
  pixels = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
  encoder = DalleEncoder()
  logits, variables = jax.eval_shape(
    encoder.init_with_output, jax.random.key(0), pixels
  )
  assert logits.shape == (1, 16, 16, 8192)
  leaves = jax.tree.leaves(variables["params"])
  assert sum(leaf.size for leaf in leaves) == 53_786_240
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
  widths = {
    name: p["conv_1"]["kernel"].shape
    for name, p in variables["params"].items()
    if name.startswith("group")
  }
  assert widths["group_1_block_1"] == (3, 3, 256, 64)
  assert widths["group_4_block_1"] == (3, 3, 1024, 512)
  assert widths["group_4_block_2"] == (3, 3, 2048, 512)


def test_bfloat16_rounds_the_convolutions_alone():
  exact = DalleEncoder(width=16, vocab_size=11)
  params = reference.parameters(exact, 16, 16, 3)
  rounded = DalleEncoder(width=16, vocab_size=11, dtype=jnp.bfloat16)
  pixels = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
  logits = toys.jit(exact.apply)({"params": params}, pixels)
  close = toys.jit(rounded.apply)({"params": params}, pixels)
  assert close.dtype == jnp.float32
  error = np.abs(close - logits).max() / np.std(logits)
  assert 1e-6 < error < 0.05
