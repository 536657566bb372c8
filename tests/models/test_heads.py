"""What is put on top of towers, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import toys
from tests.models import reference
from vlp_jax.models import heads

D = 8


def _x(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _run(module, *args):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
  params = toys.random_like(shapes)
  return params, module.apply({"params": params}, *args)


def test_text_projection():
  x = _x(2, 3, D)
  params, out = _run(heads.TextProjection(5), x)
  expected = reference.layer_norm(params["norm"], x)
  expected = expected @ params["projection"]["kernel"]
  assert set(params["projection"]) == {"kernel"}  # no bias
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_vocabulary():
  x = _x(2, 3, D)
  params, out = _run(heads.VocabularyHead(11, D), x)
  np.testing.assert_allclose(out, x @ params["kernel"], rtol=1e-5, atol=1e-6)
  low = heads.VocabularyHead(11, D, jnp.bfloat16)
  out_low = low.apply({"params": params}, x)
  assert out_low.dtype == np.float32
  assert 0 < np.abs(out_low - out).max() < 0.05


def test_temperature():
  (scale, bias), params = heads.LogitScale().init_with_output(jax.random.key(0))
  np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-6)
  np.testing.assert_allclose(params["params"]["logit_scale"], 2.6593, atol=1e-4)
  assert bias is None
  (scale, bias), _ = heads.LogitScale(10.0, -10.0).init_with_output(
    jax.random.key(0)
  )
  np.testing.assert_allclose((scale, bias), (10, -10), rtol=1e-6)


def test_decoder_input_puts_visible_patches_first():
  visible, hidden_pos = _x(2, 3, D), _x(2, 4, 6)
  visible_pos = 2 * _x(2, 3, 6)
  params, out = _run(
    heads.PatchDecoderInput(6), visible, visible_pos, hidden_pos
  )
  assert out.shape == (2, 7, 6)
  x = reference.layer_norm(params["norm"], visible)
  expected = reference.linear(params["visible"], x) + visible_pos
  np.testing.assert_allclose(out[:, :3], expected, rtol=1e-5, atol=1e-5)
  expected = params["mask_token"] + hidden_pos
  np.testing.assert_allclose(out[:, 3:], expected, rtol=1e-5, atol=1e-6)


def test_pixels():
  x = _x(2, 3, D)
  params, out = _run(heads.PixelHead(4), x)
  assert out.shape == (2, 3, 48)
  expected = reference.linear(params["pixels"], x)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  assert (
    heads.PixelHead(4).apply({"params": params}, x.astype(jnp.bfloat16)).dtype
    == np.float32
  )


def test_deep_projection():
  x = _x(2, 3, D)
  params, out = _run(heads.DeepProjection(5), x)
  hidden = reference.layer_norm(
    params["norm"], reference.linear(params["hidden"], x)
  )
  hidden = reference.ACTIVATIONS["gelu"](hidden)
  expected = reference.linear(params["projection"], hidden)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  assert out.dtype == np.float32


def test_vocabulary_starts_at_a_given_deviation():
  for std, expected in ((None, 64**-0.5), (0.02, 0.02)):
    head = heads.VocabularyHead(50, 64, std=std)
    params = head.init(jax.random.key(0), _x(1, 64))["params"]
    np.testing.assert_allclose(params["kernel"].std(), expected, rtol=0.1)
