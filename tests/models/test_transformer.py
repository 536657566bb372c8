"""The stack: against NumPy, and what must not change what it computes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.models.transformer import (
  REMAT_POLICIES,
  Transformer,
  gelu,
  quick_gelu,
)
from vlp_jax.ops import masks

B, T, S, D, DEPTH = 2, 5, 4, 8, 2


def _stack(**fields):
  fields = dict(width=D, depth=DEPTH, num_heads=2, mlp_ratio=2.0) | fields
  return Transformer(**fields)


def _inputs(seed=0, context_width=D):
  draw = np.random.default_rng(seed)
  x = draw.normal(size=(B, T, D)).astype(np.float32)
  return x, draw.normal(size=(B, S, context_width)).astype(np.float32)


def _params(stack, *args):
  shapes = jax.eval_shape(stack.init, jax.random.key(0), *args)["params"]
  return toys.random_like(shapes)


@pytest.mark.parametrize(
  "fields",
  [
    dict(),
    dict(activation="relu2", scan=False),
    dict(cross=True),
    dict(cross=True, cross_mlp=True, num_heads=4),
  ],
  ids=str,
)
def test_numpy(fields):
  stack, cross = _stack(**fields), fields.get("cross", False)
  # The context may have another width than the stack.
  x, context = _inputs(context_width=6)
  context_mask = np.array([[True, True, False, True], [True] * 4])
  args = (x, masks.causal(T))
  if cross:
    args += (context, context_mask[:, None])
  params = _params(stack, *args)
  out = toys.jit(stack.apply)({"params": params}, *args)
  for i in range(B):
    expected = reference.transformer(
      params,
      x[i],
      np.tril(np.ones((T, T), bool)),
      context[i] if cross else None,
      context_mask[i],
      activation=stack.activation,
      cross_mlp=stack.cross_mlp,
    )
    np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-5)


def test_without_context_the_cross_attention_is_left_out():
  stack, (x, context) = _stack(cross=True, cross_mlp=True), _inputs()
  params = _params(stack, x, None, context)
  gradient = toys.jit(
    jax.grad(lambda p: jnp.sum(stack.apply({"params": p}, x) ** 2))
  )(params)
  used = {
    name
    for name, branch in gradient["layers"].items()
    if any(np.any(leaf != 0) for leaf in jax.tree.leaves(branch))
  }
  assert used == {"self_norm", "self_attention", "mlp_norm", "mlp"}


def test_nothing_comes_from_the_future():
  stack, (x, _) = _stack(), _inputs()
  params = _params(stack, x)

  @functools.partial(jax.vmap, in_axes=(None, 0))
  def gradient(x, row):
    def pick(x):
      out = stack.apply({"params": params}, x, masks.causal(T))
      return jnp.sum(jnp.sum(out, axis=(0, 2)) * jax.nn.one_hot(row, T))

    return jax.grad(pick)(x)

  size = np.abs(toys.jit(gradient)(x, np.arange(T))).max(axis=(1, 3))
  assert (size[np.triu_indices(T, 1)] == 0).all()
  assert (size[np.tril_indices(T)] > 1e-4).all()


@functools.cache
def _value_and_gradient(scan, remat):
  stack = _stack(cross=True, scan=scan, remat=remat)
  x, context = _inputs()

  def loss(params, x):
    out = stack.apply({"params": params}, x, masks.causal(T), context)
    return jnp.sum(jnp.sin(out)), out

  params = _params(stack, x, None, context)
  run = toys.jit(jax.grad(loss, (0, 1), has_aux=True))
  text = run.lower(params, x).as_text()
  (gradient, _), out = run(params, x)
  return gradient, out, text


@pytest.mark.parametrize(
  "scan, remat",
  [
    *((True, policy) for policy in REMAT_POLICIES),
    *((False, policy) for policy in ("none", "full")),
  ],
)
def test_scan_and_remat_change_nothing(scan, remat):
  gradient, out, text = _value_and_gradient(scan, remat)
  expected, expected_out, plain = _value_and_gradient(True, "none")
  np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-6)
  toys.assert_gradients_close(gradient, expected)
  # But they are done: a loop or none, and more products where remat is on.
  assert ("stablehlo.while" in text) == scan
  if remat == "full" and scan:
    assert text.count("dot_general") > plain.count("dot_general")


def test_decoding_with_a_cache_is_the_causal_pass():
  stack, (x, context) = _stack(cross=True), _inputs()
  params = _params(stack, x, None, context)
  apply = functools.partial(stack.apply, {"params": params})
  expected = toys.jit(apply)(x, masks.causal(T), context)

  @toys.jit
  def decode(x, context):
    keys_values = apply(context, method="project")
    # Room for more tokens than come: the empty places must not count.
    cache = apply(B, T + 3, method="empty_cache")
    assert cache[0].shape == (DEPTH, B, T + 3, 2, D // 2)

    def step(cache, item):
      token, t = item
      out, cache = apply(token[:, None], cache, t, keys_values, method="decode")
      return cache, out[:, 0]

    return jax.lax.scan(step, cache, (x.swapaxes(0, 1), jnp.arange(T)))[1]

  out = decode(x, context).swapaxes(0, 1)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_heads_must_divide_the_width():
  stack = _stack(num_heads=3)
  with pytest.raises(ValueError, match="3 heads do not divide 8"):
    jax.eval_shape(stack.init, jax.random.key(0), _inputs()[0])


@pytest.mark.parametrize("scan", [True, False])
def test_products_are_bfloat16_and_parameters_float32(scan):
  stack = _stack(cross=True, dtype=jnp.bfloat16, scan=scan)
  x, context = _inputs()
  _, variables = jax.eval_shape(
    stack.init_with_output, jax.random.key(0), x, None, context
  )
  assert {v.dtype for v in jax.tree.leaves(variables)} == {np.dtype("float32")}
  x = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  jaxpr = jax.make_jaxpr(
    lambda x, v: stack.apply(v, x, None, context.astype(jnp.bfloat16))
  )(x, variables)
  dots = [e for e in _equations(jaxpr) if e.primitive.name == "dot_general"]
  assert len(dots) >= 9
  inputs = {v.aval.dtype for e in dots for v in e.invars}
  assert inputs == {np.dtype(jnp.bfloat16)}
  # Softmaxes, and the statistics of norms, are float32.
  kinds = ("exp", "reduce_sum", "rsqrt")
  exact = [e for e in _equations(jaxpr) if e.primitive.name in kinds]
  assert {v.aval.dtype for e in exact for v in e.invars} == {
    np.dtype("float32")
  }
  assert {e.primitive.name for e in exact} == set(kinds)


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, "eqns"):
        yield from _equations(value)
      elif hasattr(value, "jaxpr"):
        yield from _equations(value.jaxpr)


def test_gelu():
  x = np.linspace(-12, 12, 2401)
  cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
  slope = cdf + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
  got, got_slope = jax.vmap(jax.value_and_grad(gelu))(x.astype(np.float32))
  np.testing.assert_allclose(got, x * cdf, rtol=1e-6, atol=5e-7)
  np.testing.assert_allclose(got_slope, slope, rtol=1e-6, atol=5e-7)
  half = jnp.asarray(x, jnp.bfloat16)
  exact = jax.nn.gelu(half.astype(jnp.float32), approximate=False)
  assert gelu(half).dtype == jnp.bfloat16
  np.testing.assert_allclose(
    gelu(half).astype(np.float32), exact, rtol=2**-8, atol=1e-6
  )


def test_quick_gelu():
  x = np.linspace(-8, 8, 161)
  expected = x / (1 + np.exp(-1.702 * x))
  got = quick_gelu(x.astype(np.float32))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert 0.01 < np.abs(got - gelu(x.astype(np.float32))).max() < 0.03
  assert quick_gelu(jnp.zeros(1, jnp.bfloat16)).dtype == jnp.bfloat16
