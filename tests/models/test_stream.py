"""The single stream's own: what is tested of it elsewhere is in methods/."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.models.stream import SingleStream
from vlp_jax.models.transformer import Transformer


def _logits(stream, table, x):
  params = stream.init(jax.random.key(0), x, method="token_logits")["params"]
  params = params | {"embedding": {"embedding": table}}
  return stream.apply({"params": params}, x, method="token_logits")


def test_logits_of_words_are_float32_where_products_are_bfloat16():
  """Rounded to bfloat16, those between 8 and 16 would be 1/16 apart."""
  width, words = 32, 50
  stream = SingleStream(
    words, 8, Transformer(width, 1, 2, cross=True), dtype=jnp.bfloat16
  )
  draw = np.random.default_rng(0)
  table = draw.normal(size=(words, width)).astype(np.float32)
  x = draw.normal(size=(2, 3, width)).astype(np.float32)
  logits = _logits(stream, table, x)
  x, table = (
    np.asarray(v, jnp.bfloat16).astype(np.float32) for v in (x, table)
  )
  np.testing.assert_allclose(logits, x @ table.T, rtol=1e-5, atol=1e-5)
  assert logits.dtype == jnp.float32
  assert np.mean(logits == logits.astype(jnp.bfloat16)) < 0.1


def test_logits_have_the_embeddings_gradient():
  stream = SingleStream(5, 8, Transformer(4, 1, 2, cross=True))
  table, x = jnp.ones((5, 4)), jnp.arange(8.0).reshape(2, 4)

  def total(table):
    return _logits(stream, table, x).sum()

  expected = np.tile(np.sum(x, axis=0), (5, 1))
  np.testing.assert_allclose(jax.grad(total)(table), expected)
