"""Poolers: against NumPy, what each kind reads, and how a sum is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.models.poolers import KINDS, AttentionPool, ImagePool

B, N, D, WIDTH, E, QUERIES = 2, 5, 6, 8, 4, 3


def _tokens(seed=0):
  draw = np.random.default_rng(seed)
  cls, patches = draw.normal(size=(B, 1, D)), draw.normal(size=(B, N, D))
  return cls.astype(np.float32), patches.astype(np.float32)


@functools.cache
def _pool(kind):
  # Without a pooler, what is pooled has the tower's width.
  width = WIDTH if kind in ("openclip", "parallel", "cascade") else D
  pool = ImagePool(kind, E, width, QUERIES, 2)
  shapes = jax.eval_shape(pool.init, jax.random.key(0), *_tokens())["params"]
  return pool, toys.random_like(shapes)


@functools.cache
def _compiled(kind, method="__call__"):
  pool = _pool(kind)[0]
  return toys.jit(lambda p, *x: pool.apply({"params": p}, *x, method=method))


def _numpy(kind, p, cls, patches):
  norm = functools.partial(reference.layer_norm, p["norm"])
  pool = reference.attention_pool
  if kind == "cls":
    embedding, context = norm(cls)[0], norm(patches)
  elif kind == "openclip":
    out = norm(pool(p["generative"], np.concatenate([cls, patches])))
    embedding, context = out[0], out[1:]
  else:
    context = norm(
      patches if kind == "attention" else pool(p["generative"], patches)
    )
    source = context if kind == "cascade" else patches
    (pooled,) = pool(p["contrastive"], source)
    embedding = reference.layer_norm(p["embedding_norm"], pooled)
  return embedding @ p["projection"]["kernel"], context


@pytest.mark.parametrize("kind", KINDS)
def test_numpy(kind):
  params = _pool(kind)[1]
  embedding, context = _compiled(kind)(params, *_tokens())
  assert embedding.shape == (B, E)
  shapes = {
    "openclip": (QUERIES - 1, WIDTH),
    "cls": (N, D),
    "attention": (N, D),
  }
  assert context.shape == (B, *shapes.get(kind, (QUERIES, WIDTH)))
  for i, (cls, patches) in enumerate(zip(*_tokens(), strict=True)):
    expected = _numpy(kind, params, cls, patches)
    np.testing.assert_allclose(embedding[i], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(context[i], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_embedding_reads(kind):
  """Parallel: not through the generative pooler; cascade: through it alone."""
  pool, params = _pool(kind)

  def embedding(params, cls, patches):
    return jnp.sum(pool.apply({"params": params}, cls, patches)[0] ** 2)

  gradient = toys.jit(jax.grad(embedding, (0, 1, 2)))(params, *_tokens())
  used = {
    name
    for name, branch in gradient[0].items()
    if any(np.any(np.abs(g) > 1e-6) for g in jax.tree.leaves(branch))
  }
  attention = {"contrastive", "embedding_norm", "projection"}
  assert (
    used
    == {
      "cls": {"norm", "projection"},
      "attention": attention,
      "openclip": {"generative", "norm", "projection"},
      "parallel": attention,
      "cascade": attention | {"generative", "norm"},
    }[kind]
  )
  assert np.any(gradient[1] != 0) == (kind in ("cls", "openclip"))
  assert np.any(gradient[2] != 0) == (kind != "cls")


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("cls",)])
def test_a_pool_is_a_set(kind):
  params, (cls, patches) = _pool(kind)[1], _tokens()
  order = np.random.default_rng(0).permutation(N)
  a = _compiled(kind)(params, cls, patches)[0]
  b = _compiled(kind)(params, cls, patches[:, order])[0]
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_embeddings_are_those_of_pictures_of_one_patch(kind):
  params, (_, patches) = _pool(kind)[1], _tokens()
  embeddings = _compiled(kind, "patch_embeddings")(params, patches)
  assert embeddings.shape == (B, N, E)
  alone = patches.reshape(B * N, 1, D)
  expected, _ = _compiled(kind)(params, alone, alone)
  np.testing.assert_allclose(
    embeddings.reshape(B * N, E), expected, rtol=1e-4, atol=1e-5
  )


def test_contributions_add_up_to_the_output():
  pool = AttentionPool(1, 2, WIDTH)
  _, patches = _tokens()
  shapes = jax.eval_shape(pool.init, jax.random.key(0), patches)["params"]
  params = toys.random_like(shapes)
  parts, out = toys.jit(
    lambda p, x: (
      pool.apply({"params": p}, x, method="contributions"),
      pool.apply({"params": p}, x),
    )
  )(params, patches)
  total = parts.sum(axis=1) + params["out"]["bias"]
  np.testing.assert_allclose(total, out[:, 0], rtol=1e-5, atol=1e-6)
  # And each is what its token brings: attention times value, projected.
  x = reference.layer_norm(params["token_norm"], patches[0])
  q = reference.linear(
    params["q"], reference.layer_norm(params["query_norm"], params["query"])
  )
  v = reference.linear(params["v"], x)
  _, weights = reference.attention(q, reference.linear(params["k"], x), v)
  expected = np.einsum(
    "hn,nhc,hcd->nd", weights[:, 0], v, params["out"]["kernel"]
  )
  np.testing.assert_allclose(parts[0], expected, rtol=1e-4, atol=1e-5)


def test_patch_parts():
  """What a patch adds: by finite differences of the embedding, in NumPy."""
  params, (_, patches) = _pool("attention")[1], _tokens()
  draw = np.random.default_rng(1)
  direction = draw.normal(size=(B, E)).astype(np.float32)
  parts = _compiled("attention", "patch_parts")(params, patches)
  assert parts.shape == (B, N, E)
  parts = np.einsum("bne,be->bn", parts, direction)
  pool = AttentionPool(1, 2, D)
  summands = pool.apply(
    {"params": params["contrastive"]}, patches, method="contributions"
  )
  for i in range(B):
    (pooled,) = reference.attention_pool(params["contrastive"], patches[i])

    def similarity(x, i=i):
      x = reference.layer_norm(params["embedding_norm"], x)
      return x @ params["projection"]["kernel"] @ direction[i]

    for n in range(N):
      step = 1e-5 * np.asarray(summands[i, n], np.float64)
      change = similarity(pooled + step) - similarity(pooled - step)
      np.testing.assert_allclose(
        parts[i, n], change / 2e-5, rtol=1e-3, atol=1e-5
      )


def test_unknown_kinds_are_refused():
  pool = ImagePool("mean", E, WIDTH)
  with pytest.raises(ValueError, match="'mean' is none of"):
    jax.eval_shape(pool.init, jax.random.key(0), *_tokens())
