"""Two streams that attend to each other, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.models.co_attention import CoAttention
from vlp_jax.models.transformer import Transformer

B, L, S, D, DEPTH = 3, 5, 4, 8, 2
LENGTHS = np.array([5, 3, 1], np.int32)


def _fusion(**fields):
  stack = Transformer(
    D, DEPTH, 2, 2.0, cross=True, post_norm=True, epsilon=1e-12, **fields
  )
  return CoAttention(stack)


def _inputs():
  draw = np.random.default_rng(0)
  text, image = (draw.normal(size=(B, n, D)) for n in (L, S))
  return text.astype(np.float32), LENGTHS, image.astype(np.float32)


def _all(fusion, *args):
  text, image = fusion(*args)
  return text, image, fusion.pool(text[:, 0], image[:, 0])


@functools.cache
def _params():
  init = functools.partial(_fusion().init, method=_all)
  return toys.random_like(
    jax.eval_shape(init, jax.random.key(0), *_inputs())["params"]
  )


@toys.jit
def _run(*args):
  return _fusion().apply({"params": _params()}, *args, method=_all)


def _layer(p, text, image, mask):
  """One layer: either block reads what the other was given."""
  block = functools.partial(reference.post_norm_block, epsilon=1e-12)
  return (
    block(p["text"], text, mask, image, None),
    block(p["image"], image, None, text, mask),
  )


def test_numpy():
  texts, _, images = _inputs()
  got = _run(*_inputs())
  params = _params()
  for i in range(B):
    text = texts[i] + params["types"][0]
    image = images[i] + params["types"][1]
    mask = (np.arange(L) < LENGTHS[i])[None]
    for layer in range(DEPTH):
      p = reference.pick(params["layers"], layer)
      text, image = _layer(p, text, image, mask)
    pooled = np.concatenate(
      [
        np.tanh(reference.linear(params["text_pool"], text[0])),
        np.tanh(reference.linear(params["image_pool"], image[0])),
      ]
    )
    real = LENGTHS[i]
    np.testing.assert_allclose(
      got[0][i, :real], text[:real], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(got[1][i], image, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[2][i], pooled, rtol=1e-4, atol=1e-5)


def test_padded_text_is_truncated_text():
  text, _, image = _inputs()
  fused, seen, pooled = _run(*_inputs())
  for i, real in enumerate(LENGTHS):
    one = slice(i, i + 1)
    got = _run(text[one, :real], LENGTHS[one], image[one])
    want = fused[i, :real], seen[i], pooled[i]
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-5)
  noise = text.copy()
  noise[np.arange(L) >= LENGTHS[:, None]] = 9.0
  np.testing.assert_array_equal(_run(noise, LENGTHS, image)[1], seen)


@functools.cache
def _gradient(scan, remat):
  def loss(params):
    out = _fusion(scan=scan, remat=remat).apply(
      {"params": params}, *_inputs(), method=_all
    )
    return sum(jnp.sum(jnp.sin(x)) for x in out)

  run = toys.jit(jax.grad(loss))
  return run(_params()), run.lower(_params()).as_text()


@pytest.mark.parametrize("scan, remat", [(True, "full"), (False, "none")])
def test_scan_and_remat_change_nothing(scan, remat):
  gradient, text = _gradient(scan, remat)
  expected, plain = _gradient(True, "none")
  toys.assert_gradients_close(gradient, expected)
  assert ("stablehlo.while" in text) == scan
  if remat == "full":
    assert text.count("dot_general") > plain.count("dot_general")


def test_the_maps_of_every_layer_can_be_read():
  """For heat maps: the last layer's row of text over patches, say."""
  apply = functools.partial(_fusion().apply, mutable=["intermediates"])
  _, sown = toys.jit(apply)({"params": _params()}, *_inputs())
  layers = sown["intermediates"]["layers"]
  (text,), (image,) = (layers[k]["attention_map"] for k in ("text", "image"))
  assert text.shape == (DEPTH, B, 2, L, S)
  assert image.shape == (DEPTH, B, 2, S, L)
  np.testing.assert_allclose(text.sum(-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(image[:, 2, ..., 1:], 0)  # pads
