"""Attention of short sequences on a TPU: scores never leave the chip.

One program has all queries and keys of a few heads in fast memory, so it makes
whole rows of probabilities, without the running maxima of flash attention
(Dao et al. 2022); the backward pass makes them again, from queries and keys.
Neither is padded, and heads stay side by side, as products leave them. Which
probabilities are dropped is made again, too.

On a mesh, its last axis splits heads, and the others examples.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from vlp_jax.ops.dropout import Drop
from vlp_jax.ops.masks import Mask

# Of one head, whose scores take four bytes each, a few times over.
MAX_SCORES = 2**19
_MASKED = -1e30
_LANES = 128


class Kind(NamedTuple):
  """What a kernel is made for.

  Attributes:
    h: channels of a head.
    causal: whether no query attends to keys after it.
    padded: whether lengths matter.
    dropout: rate at which probabilities are dropped.
  """

  h: int
  causal: bool
  padded: bool
  dropout: float


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask: Mask,
  dropout: Drop | None = None,
) -> jax.Array:
  """Attends; see `ops.attention.attend`.

  Args:
    q_BTNH: queries; T x S is at most `MAX_SCORES`.
    k_BSNH: keys.
    v_BSNH: values.
    mask: of the keys.
    dropout: of the probabilities; what is kept is what `kept` says.

  Returns:
    `[B, T, N, H]`, in the dtype of `v`.
  """
  b, _, n, h = q_BTNH.shape
  size = k_BSNH.shape[1]
  lengths = jnp.full((b,), size) if mask.lengths is None else mask.lengths
  rate = dropout.rate if dropout else 0.0
  kind = Kind(h, mask.causal, mask.lengths is not None, rate)
  q, k, v = (x.reshape(*x.shape[:2], n * h) for x in (q_BTNH, k_BSNH, v_BSNH))
  seeds = (
    draw_seeds(dropout.key, b, n)
    if dropout
    else jnp.zeros((b, n, 2), jnp.int32)
  )

  def on_a_device(*args):
    return _attend(*args, kind)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1:  # XLA cannot split a kernel
    rows, heads = P(mesh.axis_names[:-1]), mesh.axis_names[-1]
    split = P(*rows, None, heads)
    on_a_device = jax.shard_map(
      on_a_device,
      in_specs=(split, split, split, rows, P(*rows, heads)),
      out_specs=split,
      check_vma=False,
    )
  lengths = lengths.astype(jnp.int32)
  return on_a_device(q, k, v, lengths, seeds).reshape(q_BTNH.shape)


def draw_seeds(key: jax.Array, b: int, n: int) -> jax.Array:
  """Draws what `kept` wants of each example and head: int32 `[b, n, 2]`.

  Args:
    key: what decides.
    b: number of examples, those of all devices.
    n: number of heads.
  """
  return jax.random.bits(key, (b, n, 2)).astype(jnp.int32)


def kept(seeds: tuple, shape: tuple[int, int], rate: float) -> jax.Array:
  """Says which probabilities of a head are kept, bool `[T, S]`.

  A probability's place goes through the finalizer of MurmurHash3 (Appleby
  2011), a bijection of 32 bits, with a seed before it and one amid it. It takes
  a TPU a tenth of the operations of jax.random's threefry, and gives the same
  wherever it runs.

  Args:
    seeds: two int32 scalars.
    shape: (T, S).
    rate: the share that is dropped.
  """
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1)
  )
  first, second = (seed.astype(jnp.uint32) for seed in seeds)
  x = (row * shape[1] + column).astype(jnp.uint32) ^ first
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = x ^ second
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  x = x ^ (x >> 16)
  # 24 bits: a TPU compares integers with signs.
  return (x >> 8).astype(jnp.int32) >= round(rate * 2**24)


def problem(q_BTNH: jax.Array, k_BSNH: jax.Array) -> str:
  """Says why these cannot be attended with, or nothing."""
  b, t, n, _ = q_BTNH.shape
  size = k_BSNH.shape[1]
  if t * size > MAX_SCORES:
    return f"tpu takes no {t} x {size} scores"
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and jax.device_count() > 1:
    return "nobody says what the mesh is"
  *rows, heads = mesh.axis_sizes or (1,)
  if b % math.prod(rows) or n % heads:
    return f"the mesh does not divide {b} examples and {n} heads"
  return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, lengths, seeds, kind):
  return _call(_forward, 2, (q, k, v), (q,), (lengths, seeds), kind)[0]


def _save(q, k, v, lengths, seeds, kind):
  saved = q, k, v, lengths, seeds
  return _attend(*saved, kind), saved


def _pull(kind, saved, g):
  q, k, v, *ints = saved
  args = (q, k, v, g.astype(v.dtype))
  return *_call(_backward, 5, args, (q, k, v), ints, kind), None, None


_attend.defvjp(_save, _pull)


def _call(kernel, products, args, like, ints, kind):
  """Runs a kernel on every example and every group of heads.

  Args:
    kernel: what a program does.
    products: how many it makes of the size of queries by keys.
    args: the arrays `[B, T, N * H]` that it reads: queries, keys, and more.
    like: those that are shaped as what it writes.
    ints: int32, lengths of the keys `[B]`, and seeds `[B, N, 2]`.
    kind: what it is made for.
  """
  b, t, width = args[0].shape
  h = kind.h
  scores = b * t * args[1].shape[1] * (width // h)
  lanes = math.lcm(h, _LANES)  # the fewest whole heads that fill registers
  if width % lanes:
    lanes = width

  def spec(x):
    return pl.BlockSpec((None, x.shape[1], lanes), lambda i, j, *_: (i, 0, j))

  return pl.pallas_call(
    functools.partial(kernel, kind=kind),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, width // lanes),
      in_specs=[spec(x) for x in args],
      out_specs=[spec(x) for x in like],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
    # For XLA, which hides other work behind it, and for whoever counts.
    cost_estimate=pl.CostEstimate(
      flops=products * 2 * scores * h,
      transcendentals=scores,
      bytes_accessed=sum(x.nbytes for x in (*args, *like)),
    ),
  )(ints[0], ints[1].reshape(-1), *args)  # one axis takes least room


def _dot(x, y, axes):
  """Sums over an axis of either, in float32."""
  return jax.lax.dot_general(
    x, y, (axes, ((), ())), preferred_element_type=jnp.float32
  )


def _probabilities(q, k, length, kind):
  """Probabilities `[T, S]` of one head."""
  s = _dot(q, k, ((1,), (1,)))
  key = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
  if kind.causal:
    row = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    s = jnp.where(key <= row, s, _MASKED)
  if kind.padded:
    s = jnp.where(key < length, s, _MASKED)
  p = jnp.exp(s - jnp.max(s, axis=1, keepdims=True))
  return p * (1 / jnp.sum(p, axis=1, keepdims=True))


def _heads(lengths, seeds, refs, kind):
  """Yields of each head of a block where it is, and what it has.

  That is its lanes; its part of every array, with the queries scaled; its
  probabilities; and what dropout multiplies these by.
  """
  h, example, block = kind.h, pl.program_id(0), pl.program_id(1)
  heads = refs[0].shape[1] // h
  for i in range(heads):
    lanes = slice(i * h, (i + 1) * h)
    q, k, *rest = (ref[:, lanes] for ref in refs)
    q = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)
    p = _probabilities(q, k, lengths[example], kind)
    scale = 1.0
    if kind.dropout:
      place = (example * pl.num_programs(1) + block) * heads + i
      keep = kept(
        (seeds[2 * place], seeds[2 * place + 1]), p.shape, kind.dropout
      )
      scale = jnp.where(keep, 1 / (1 - kind.dropout), 0.0)
    yield lanes, (q, k, *rest), p, scale


def _forward(lengths, seeds, q_ref, k_ref, v_ref, o_ref, *, kind):
  refs = q_ref, k_ref, v_ref
  for lanes, (_, _, v), p, scale in _heads(lengths, seeds, refs, kind):
    o = _dot((p * scale).astype(v.dtype), v, ((1,), (0,)))
    o_ref[:, lanes] = o.astype(o_ref.dtype)


def _backward(lengths, seeds, *refs, kind):
  *refs, dq_ref, dk_ref, dv_ref = refs
  for lanes, (q, k, v, g), p, scale in _heads(lengths, seeds, refs, kind):
    dv = _dot((p * scale).astype(g.dtype), g, ((0,), (0,)))
    dv_ref[:, lanes] = dv.astype(v.dtype)
    dp = _dot(g, v, ((1,), (1,))) * scale
    ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True))
    ds = ds.astype(q.dtype)
    dq = _dot(ds, k, ((1,), (0,))) * kind.h**-0.5
    dq_ref[:, lanes] = dq.astype(q.dtype)
    dk_ref[:, lanes] = _dot(ds, q, ((0,), (0,))).astype(k.dtype)
