"""Fused attention: against NumPy, dropout, loops, meshes.

The TPU's kernel is interpreted; cuDNN's runs where there is a GPU for it, and
elsewhere is only lowered, with its version made up.
"""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import pallas as pl

from tests import toys
from vlp_jax import flops, sharding
from vlp_jax.models.transformer import Transformer
from vlp_jax.ops import attention, dropout, masks, platforms, tpu_attention

B, N, H = 2, 2, 8
LENGTHS = np.array([2, 6], np.int32)
# Of T queries and S keys.
CASES = {
  "all": (5, 5, masks.Mask()),
  "causal": (5, 5, masks.Mask(causal=True)),
  "lengths": (3, 7, masks.Mask(LENGTHS)),
  "both": (7, 7, masks.Mask(LENGTHS, causal=True)),
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def interpreted():
  """Runs kernels of TPUs on a CPU."""
  call = functools.partial(pl.pallas_call, interpret=True)
  with mock.patch.object(pl, "pallas_call", call):
    yield


def on_mesh(function, *shape):
  devices = jax.devices()[: np.prod(shape)]
  return sharding.on_mesh(function, sharding.make_mesh(shape, devices))


def draw(*shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(t, s, dtype, leading=(B,)):
  """Queries, keys, values, and the output's gradient; and as NumPy."""
  sizes = (t, s, s, t)
  made = [draw(*leading, x, N, H, seed=i) for i, x in enumerate(sizes)]
  made = [jnp.asarray(x, dtype) for x in made]
  return made, [np.asarray(x, np.float64) for x in made]


def reference(q, k, v, g, mask, drop=1.0):
  """Output and gradients, by hand; probabilities are multiplied by `drop`."""
  t, s = q.shape[1], k.shape[1]
  seen = np.ones((B, t, s), bool)
  if mask.causal:
    seen &= np.arange(s) <= np.arange(t)[:, None]
  if mask.lengths is not None:
    seen &= np.arange(s) < mask.lengths[:, None, None]
  scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
  e = np.where(seen[:, None], np.exp(scores), 0)
  p = e / e.sum(axis=-1, keepdims=True)
  dp = np.einsum("btnh,bsnh->bnts", g, v) * drop
  ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.sqrt(H)
  return (
    np.einsum("bnts,bsnh->btnh", p * drop, v),
    np.einsum("bnts,bsnh->btnh", ds, k),
    np.einsum("bnts,btnh->bsnh", ds, q),
    np.einsum("bnts,btnh->bsnh", p * drop, g),
  )


def run(kernel, q, k, v, g, mask, dropout=None):
  """Output and gradients, by a kernel that has to be the one chosen."""

  def both(q, k, v, g):
    out, pull = jax.vjp(
      lambda *x: attention.attend(
        *x, mask, dropout=dropout, read=False, kernel=kernel
      )[0],
      *(q, k, v),
    )
    return out, *pull(g)

  with attention.choices() as found:
    values = toys.jit(on_mesh(both, 1, 1, 1))(q, k, v, g)
  assert {choice.kernel for choice in found} == {kernel}
  return values


def assert_equals_reference(kernel, case, dtype):
  t, s, mask = CASES[case]
  made, exact = inputs(t, s, dtype)
  got = run(kernel, *made, mask)
  assert all(x.dtype == dtype for x in got)
  for x, y in zip(got, reference(*exact, mask), strict=True):
    x, tolerance = np.asarray(x, np.float64), TOLERANCES[dtype]
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  ("case", "dtype"),
  [*((case, "float32") for case in CASES), ("both", "bfloat16")],
)
@pytest.mark.parametrize("kernel", ["xla", "tpu"])
def test_output_and_gradients(interpreted, kernel, case, dtype):
  assert_equals_reference(kernel, case, dtype)


def murmur(seeds, t, s):
  """What a head keeps of `[t, s]` is where this is at least the rate."""
  x = np.arange(t * s, dtype=np.uint32).reshape(t, s) ^ np.uint32(seeds[0])
  x = (x ^ x >> 16) * np.uint32(0x85EBCA6B) ^ np.uint32(seeds[1])
  x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
  return ((x ^ x >> 16) >> 8) / 2**24


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["xla", "tpu"])
def test_dropout(interpreted, kernel, case):
  (t, s, mask), rate = CASES[case], 0.3
  made, exact = inputs(t, s, "float32")
  drop = dropout.Drop(rate, jax.random.key(5))
  if kernel == "xla":
    keep = np.asarray(drop(jnp.ones((B, N, t, s)))) > 0
  else:
    seeds = np.asarray(tpu_attention.draw_seeds(drop.key, B, N)).view(np.uint32)
    keep = np.array([[murmur(x, t, s) for x in row] for row in seeds]) >= rate
  assert 0 < keep.mean() < 1
  got = run(kernel, *made, mask, drop)
  want = reference(*exact, mask, keep / (1 - rate))
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_what_is_dropped_is_random():
  """Of 48 heads: as many as asked for, whatever others and neighbours are."""
  rate, t, s = 0.1, 64, 257
  seeds = tpu_attention.draw_seeds(jax.random.key(0), 16, 3).reshape(-1, 2)
  dropped = ~np.asarray(
    jax.vmap(lambda x: tpu_attention.kept((x[0], x[1]), (t, s), rate))(seeds)
  )

  def share(of, rate):
    """Standard deviations that the share of true ones is from a rate."""
    return abs(of.mean() - rate) / np.sqrt(rate * (1 - rate) / of.size)

  assert share(dropped, rate) < 4
  for axis in (0, 1, 2):
    assert share(dropped & np.roll(dropped, 1, axis), rate**2) < 4
    means = dropped.mean(axis=axis)  # as even as those of independent draws
    spread = means.std() / np.sqrt(rate * (1 - rate) / dropped.shape[axis])
    assert abs(spread - 1) < 4 / np.sqrt(means.size)
  assert tpu_attention.kept((seeds[0, 0], seeds[0, 1]), (t, s), 0.0).all()


def test_the_tpu_s_kernel_says_what_it_does():
  """As XLA's attention; backward, the scores are made once more."""
  t, s, mask = CASES["lengths"]
  made, _ = inputs(t, s, "bfloat16")
  said, call = [], pl.pallas_call

  def keep(kernel, **options):
    said.append(options["cost_estimate"])
    return call(kernel, interpret=True, **options)

  with mock.patch.object(pl, "pallas_call", keep):
    run("tpu", *made, mask)

  def forward(q, k, v):
    return attention.attend(q, k, v, mask, read=False)[0]

  def both(*args):
    out, pull = jax.vjp(forward, *args)
    return pull(out)

  products = flops.count(forward, *made[:3])
  backward = flops.count(both, *made[:3]) - products
  assert [x.flops for x in said] == [products, backward + products // 2]
  assert said[0].transcendentals == B * N * t * s
  q, k = B * t * N * H * 2, B * s * N * H * 2
  assert [x.bytes_accessed for x in said] == [2 * q + 2 * k, 3 * q + 4 * k]


@pytest.mark.skipif(
  platforms.platform() != "cuda", reason="needs an NVIDIA GPU from Ampere on"
)
@pytest.mark.parametrize("case", CASES)
def test_cudnn(case):
  assert_equals_reference("cudnn", case, "bfloat16")


@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_asked_for(case):
  """Numbers of tokens are made even; XLA computes what it would."""
  function, asked = jax.nn.dot_product_attention, []

  def by_xla(q, k, v, implementation, **options):
    asked.append((implementation, q.shape[1] % 2, k.shape[1] % 2))
    return function(q, k, v, implementation="xla", **options)

  with mock.patch.object(jax.nn, "dot_product_attention", by_xla):
    assert_equals_reference("cudnn", case, "bfloat16")
  assert set(asked) == {("cudnn", 0, 0)}


def test_nothing_to_attend_to_is_the_same_everywhere(interpreted):
  made, _ = inputs(3, 4, "float32")
  mask = masks.Mask(np.array([0, 4]))
  want, got = (run(kernel, *made, mask) for kernel in ("xla", "tpu"))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
  assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("case", CASES)
def test_cudnn_gets_no_bias(case):
  """So that odd numbers of tokens can train."""
  t, s, mask = CASES[case]
  made, _ = inputs(t, s, "bfloat16")

  def gradients(q, k, v, g):
    def attend(*x):
      return attention.attend(*x, mask, read=False, kernel="cudnn")[0]

    return jax.vjp(attend, q, k, v)[1](g)

  with mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000):
    traced = jax.jit(gradients).trace(*made)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax" in text
  assert "__cudnn$fmhaSoftmaxBackward" in text
  assert "Bias" not in text
  kinds = {"causal": "CAUSAL", "both": "PADDING_CAUSAL"}
  text = text.replace(r"\22", '"')
  (kind,) = set(re.findall('"mask_type": "([A-Z_]+)"', text))
  assert kind == kinds.get(case, "PADDING")  # one key is added to odd numbers


@pytest.mark.parametrize("kernel", ["xla", "tpu"])
def test_frames(interpreted, kernel):
  f, t = 3, 4
  (q, k, v, _), (q64, k64, v64, _) = inputs(t, t, "float32", (B, f))
  function = functools.partial(
    attention.attend_in_frames, read=False, kernel=kernel
  )
  got, probabilities = toys.jit(on_mesh(function, 1, 1, 1))(q, k, v)
  assert (probabilities is None) == (kernel == "tpu")

  def flat(x):
    return x.reshape(B, f * t, N, H)

  place = np.arange(f * t)
  same = place[:, None] // t == place // t
  seen = same | (place % t == 0)[:, None]
  scores = np.einsum("btnh,bsnh->bnts", flat(q64), flat(k64)) / np.sqrt(H)
  e = np.where(seen, np.exp(scores), 0)
  p = e / e.sum(axis=-1, keepdims=True)
  want = np.einsum("bnts,bsnh->btnh", p, flat(v64)).reshape(got.shape)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "tpu"])
def test_frames_and_dropout(interpreted, kernel):
  """First tokens and the others drop each on their own."""
  f, t = 2, 4
  (q, k, v, _), _ = inputs(t, t, "float32", (B, f))
  drop = dropout.Drop(0.5, jax.random.key(1))
  first, rest = drop.split()

  def apart(q, k, v):
    options = dict(read=False, kernel=kernel)
    every = [x.reshape(B, f * t, N, H) for x in (k, v)]
    each = [x.reshape(B * f, t, N, H) for x in (q, k, v)]
    each[0] = each[0][:, 1:]
    return (
      attention.attend(q[:, :, 0], *every, dropout=first, **options)[0],
      attention.attend(*each, dropout=rest, **options)[0],
    )

  together = functools.partial(
    attention.attend_in_frames, dropout=drop, read=False, kernel=kernel
  )
  got, _ = toys.jit(on_mesh(together, 1, 1, 1))(q, k, v)
  want_first, want_rest = toys.jit(on_mesh(apart, 1, 1, 1))(q, k, v)
  np.testing.assert_allclose(got[:, :, 0], want_first, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    got[:, :, 1:], want_rest.reshape(B, f, t - 1, N, H), rtol=1e-5, atol=1e-6
  )
  assert (jax.random.key_data(first.key) != jax.random.key_data(rest.key)).any()


# --- In a stack ---------------------------------------------------------------

STACK = dict(width=16, depth=2, num_heads=2, cross=True)
X, CONTEXT = draw(4, 5, 16, seed=5), draw(4, 3, 16, seed=6)
MASKS = masks.Mask(causal=True), masks.Mask(np.array([1, 3, 2, 3]))


@functools.cache
def params():
  init = functools.partial(Transformer(**STACK).init, context=CONTEXT)
  return toys.random_like(jax.eval_shape(init, jax.random.key(0), X)["params"])


def stack_values(shape, **fields):
  """The value and the gradients of a stack, on a mesh."""
  stack = Transformer(**STACK, **fields)

  def loss(params, x):
    out = stack.apply(
      {"params": params},
      *(x, MASKS[0], CONTEXT, MASKS[1]),
      rngs={"dropout": jax.random.key(3)},
    )
    return jnp.sum(jnp.sin(out))

  mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
  x = jax.device_put(X, jax.NamedSharding(mesh, sharding.BATCH))
  function = sharding.on_mesh(jax.value_and_grad(loss, (0, 1)), mesh)
  made = params()
  with attention.choices() as found:
    values = toys.jit(function)(made, x)
  assert {x.kernel for x in found} == {fields.get("attention", "xla")}
  return values


@functools.cache
def stack_by_xla():
  return stack_values((1, 1, 1))


def assert_same(got, want):
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("shape", "scan", "remat"),
  [
    ((2, 1, 1), True, "full"),
    ((1, 1, 2), False, "dots"),
  ],
)
def test_loops_recomputing_and_meshes(interpreted, shape, scan, remat):
  got = stack_values(shape, scan=scan, remat=remat, attention="tpu")
  assert_same(got, stack_by_xla())


@functools.cache
def stack_that_drops():
  return stack_values((1, 1, 1), dropout=0.3, attention="tpu")


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2), (1, 2, 2)])
def test_what_is_dropped_depends_on_no_mesh(interpreted, shape):
  """Nor on what is computed again."""
  want = stack_that_drops()
  got = stack_values(shape, dropout=0.3, remat="dots", attention="tpu")
  assert_same(got, want)
  assert abs(want[0] - stack_by_xla()[0]) > 0.1


@pytest.mark.parametrize(
  ("rate", "rngs", "mutable", "reasons"),
  [
    (0.0, True, [], ["cpu"]),
    (0.5, False, [], ["cpu"]),
    (0.5, True, [], ["cpu"]),
    (0.0, False, ["intermediates"], ["cpu", "its probabilities are read"]),
    (0.0, False, ["self_attention"], ["its probabilities are read", "cpu"]),
  ],
)
def test_who_needs_probabilities_gets_them(rate, rngs, mutable, reasons):
  stack = Transformer(**STACK, dropout=rate, attention="tpu")
  apply = functools.partial(
    stack.apply,
    {"params": params()},
    context=CONTEXT,
    rngs={"dropout": jax.random.key(0)} if rngs else {},
    mutable=mutable,
  )
  with attention.choices() as found:
    _, sown = jax.eval_shape(on_mesh(apply, 1, 1, 1), X)
  assert [choice.reason for choice in found] == reasons
  assert list(sown) == mutable
