"""Multi-head attention, self and cross."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.dense import FromHeads, ToHeads
from vlp_jax.models.initializers import BlockInit
from vlp_jax.ops import masks
from vlp_jax.ops.attention import attend, attend_in_frames
from vlp_jax.ops.dropout import Drop

KeysValues = tuple[jax.Array, jax.Array]


class SelfAttention(nn.Module):
  """Attention of a sequence to itself, with one matrix for q, k and v.

  Attributes:
    num_heads: N; the width must be a multiple.
    inits: the stack's initializers.
    dropout: rate at which probabilities are dropped where the key `dropout` is
      given to `apply`.
    dtype: of the matrix products.
    kernel: what computes it, a name in `ops.attention.KERNELS`; where
      probabilities are read it is XLA always.
  """

  num_heads: int
  inits: BlockInit
  dropout: float = 0.0
  dtype: Any = jnp.float32
  kernel: str = "xla"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: masks.Mask | jax.Array | None = None,
    cache: KeysValues | None = None,
    position: jax.Array | None = None,
  ) -> tuple[jax.Array, KeysValues | None]:
    """Attends.

    Args:
      x: `[B, T, D]`, or frames `[B, F, T, D]`, which take neither mask nor
        cache; see `attend_in_frames`.
      mask: a `Mask`, or bool `[B or 1, T, T]`, True = attend.
      cache: when decoding, keys and values so far, each `[B, L, N, H]`; T is
        then 1, and `mask` is not used.
      position: int32 scalar, the place of the one token of `x` in the cache.

    Returns:
      What `x` is, and the cache with this token's keys and values in it. The
      probabilities `[B, N, T, T]` (of frames: both kinds) go to the collection
      `self_attention`, where that is mutable.
    """
    q, k, v = ToHeads(
      self.num_heads,
      x.shape[-1] // self.num_heads,
      self.inits.project(),
      sets=3,
      dtype=self.dtype,
      name="qkv",
    )(x)
    if cache is not None:
      k, v = cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
        for old, new in zip(cache, (k, v), strict=True)
      )
      mask = (jnp.arange(k.shape[1]) <= position)[None, None]
    read = self.is_mutable_collection("self_attention")
    options = dict(dropout=_drop(self), read=read, kernel=self.kernel)
    if x.ndim == 4:
      attended, probabilities = attend_in_frames(q, k, v, **options)
    else:
      attended, probabilities = attend(q, k, v, mask, **options)
    if probabilities is not None:
      self.sow("self_attention", "map", probabilities)
    return Out(self.inits, self.dtype, name="out")(attended), cache


class CrossAttention(nn.Module):
  """Attention of a sequence to a context of the other modality.

  Attributes: as in `SelfAttention`.
  """

  num_heads: int
  inits: BlockInit
  dropout: float = 0.0
  dtype: Any = jnp.float32
  kernel: str = "xla"

  def setup(self):
    heads = functools.partial(
      ToHeads,
      self.num_heads,
      self.inits.width // self.num_heads,
      self.inits.project(),
      dtype=self.dtype,
    )
    self.q = heads()
    self.kv = heads(sets=2)
    self.out = Out(self.inits, self.dtype)

  def project(self, context: jax.Array) -> KeysValues:
    """Returns keys and values `[B, S, N, H]` of a context `[B, S, C]`."""
    return self.kv(context)

  def __call__(
    self,
    x: jax.Array,
    keys_values: KeysValues,
    mask: masks.Mask | jax.Array | None = None,
    read: bool = True,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Attends.

    Args:
      x: `[B, T, D]`.
      keys_values: what `project` returns.
      mask: a `Mask`, or bool `[B or 1, T or 1, S]`, True = attend.
      read: whether the probabilities are asked for.

    Returns:
      `[B, T, D]` and the probabilities `[B, N, T, S]`, or None where a kernel
      does not make them. To these is added what the collection `perturbations`
      holds, where it is given, before they weigh the values: a gradient with
      respect to it is one with respect to them.
    """
    perturbed = self.has_variable("perturbations", "attention_map")

    def perturb(weights):
      return weights + self.get_variable("perturbations", "attention_map")

    attended, probabilities = attend(
      self.q(x),
      *keys_values,
      mask,
      dropout=_drop(self),
      through=perturb if perturbed else None,
      read=read,
      kernel=self.kernel,
    )
    return self.out(attended), probabilities


def _drop(module: SelfAttention | CrossAttention) -> Drop | None:
  """Returns what drops probabilities, if anything does."""
  if module.dropout and module.has_rng("dropout"):
    return Drop(module.dropout, module.make_rng("dropout"))
  return None


class Dropout(nn.Module):
  """Dropout that is on where the key `dropout` is given to `apply`.

  Attributes:
    rate: share of numbers that become zero.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Keeps each number with probability 1 - rate, scaled by its inverse."""
    off = not self.has_rng("dropout")
    return nn.Dropout(self.rate, deterministic=off)(x)


class Out(nn.Module):
  """The matrix after attention: heads `[..., N, H]` to `[..., D]`."""

  inits: BlockInit
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, heads: jax.Array) -> jax.Array:
    return FromHeads(
      self.inits.width,
      self.inits.write(heads.shape[-2] * heads.shape[-1]),
      dtype=self.dtype,
      name="proj",
    )(heads)
