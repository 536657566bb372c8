"""The one stack of transformer blocks that every tower uses."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.models.attention import (
  CrossAttention,
  Dropout,
  KeysValues,
  SelfAttention,
)
from vlp_jax.models.dense import Dense
from vlp_jax.models.initializers import BlockInit
from vlp_jax.ops import masks


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) (Hendrycks & Gimpel 2016), computed in float32.

  As PyTorch does it, with erf; the erfc of `jax.nn.gelu` and its gradient take
  a CPU more than twice as long.
  """
  wide = x.astype(jnp.float32)
  return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  wide = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * math.pi) ** -0.5
  slope = _normal_cdf(wide) + wide * density
  return gelu(x), slope.astype(x.dtype) * tangent


def _normal_cdf(x: jax.Array) -> jax.Array:
  return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), computed in float32: what OpenAI's CLIP has.

  An approximation of `gelu` (Hendrycks & Gimpel 2016) that is off by up to
  0.02, so weights of one do not do for the other.
  """
  wide = x.astype(jnp.float32)
  return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


ACTIVATIONS = {
  "gelu": gelu,
  "quick_gelu": quick_gelu,
  # Primer's squared ReLU (So et al. 2021): cheap where erf is not.
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def layer_norm(
  name: str | None = None, dtype: Any = jnp.float32, epsilon: float = 1e-5
) -> nn.LayerNorm:
  """Layer norm, by default open_clip's; statistics are float32 always."""
  return nn.LayerNorm(
    epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name
  )


def take_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
  """Gathers rows inside groups: no group needs what another one holds.

  Args:
    array: `[G g, ...]`, G groups of g consecutive rows.
    rows: int `[G, M]`, places in the group, 0 to g - 1.

  Returns:
    `[G M, ...]`.
  """
  rest = array.shape[1:]
  grouped = array.reshape(rows.shape[0], -1, *rest)
  index = rows.reshape(*rows.shape, *(1,) * len(rest))
  return jnp.take_along_axis(grouped, index, axis=1).reshape(-1, *rest)


class MLP(nn.Module):
  """Two matrices and what is between them."""

  hidden: int
  activation: str
  inits: BlockInit
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    x = Dense(
      self.hidden,
      kernel_init=self.inits.up(self.hidden),
      bias_init=self.inits.mlp_bias(width),
      dtype=self.dtype,
      name="up",
    )(x)
    return Dense(
      width,
      kernel_init=self.inits.write(self.hidden),
      bias_init=self.inits.mlp_bias(self.hidden),
      dtype=self.dtype,
      name="down",
    )(ACTIVATIONS[self.activation](x))


class Block(nn.Module):
  """A block: self-attention, cross-attention if asked for, MLP.

  Attributes:
    num_heads: heads of either attention.
    mlp_dim: hidden width of the MLP.
    inits: the stack's initializers, with the width.
    cross: whether the block can attend to a context.
    cross_mlp: whether another MLP comes between self- and cross-attention, as
      in open_clip's text decoder, where each of the two is a whole block.
    activation: a name in `ACTIVATIONS`.
    post_norm: norm the sum of a branch and its input, as BERT does, and not
      the branch's input; a context is then taken as it is.
    epsilon: of the norms.
    dropout: rate, on every branch and on attention's probabilities.
    dtype: of the matrix products.
    attention: what computes it, a name in `ops.attention.KERNELS`.
  """

  num_heads: int
  mlp_dim: int
  inits: BlockInit
  cross: bool = False
  cross_mlp: bool = False
  activation: str = "gelu"
  post_norm: bool = False
  epsilon: float = 1e-5
  dropout: float = 0.0
  dtype: Any = jnp.float32
  attention: str = "xla"

  def setup(self):
    def norm():
      return layer_norm(dtype=self.dtype, epsilon=self.epsilon)

    def mlp():
      return MLP(self.mlp_dim, self.activation, self.inits, self.dtype)

    self.self_norm = norm()
    attention = dict(
      num_heads=self.num_heads,
      inits=self.inits,
      dropout=self.dropout,
      dtype=self.dtype,
      kernel=self.attention,
    )
    self.self_attention = SelfAttention(**attention)
    if self.cross:
      self.cross_norm = norm()
      if not self.post_norm:
        self.context_norm = norm()
      self.cross_attention = CrossAttention(**attention)
      if self.cross_mlp:
        self.self_mlp_norm = norm()
        self.self_mlp = mlp()
    self.mlp_norm = norm()
    self.mlp = mlp()
    self.drop = Dropout(self.dropout)

  def project(self, carry: None, context: jax.Array):
    """Keys and values of a context `[B, S, D]`, for `keys_values`."""
    if not self.post_norm:
      context = self.context_norm(context)
    return carry, self.cross_attention.project(context)

  def __call__(
    self,
    x: jax.Array,
    mask: masks.Mask | jax.Array | None,
    context: jax.Array | None,
    context_mask: masks.Mask | jax.Array | None,
    position: jax.Array | None,
    cache: KeysValues | None,
    keys_values: KeysValues | None,
    rows: jax.Array | None,
  ) -> tuple[jax.Array, KeysValues | None]:
    def add(norm, branch):
      """Puts a branch on the residual stream, before or after its norm."""
      if self.post_norm:
        return norm(x + self.drop(branch(x)))
      return x + self.drop(branch(norm(x)))

    def attend_to_itself(x):
      nonlocal cache
      attended, cache = self.self_attention(x, mask, cache, position)
      return attended

    def attend_to_context(x):
      attended, probabilities = self.cross_attention(
        x,
        keys_values,
        context_mask,
        read=self.is_mutable_collection("intermediates"),
      )
      if probabilities is not None:
        self.sow("intermediates", "attention_map", probabilities)
      return attended

    x = add(self.self_norm, attend_to_itself)
    if context is not None or keys_values is not None:
      if self.cross_mlp:
        x = add(self.self_mlp_norm, self.self_mlp)
      if keys_values is None:
        keys_values = self.project(None, context)[1]
      if rows is not None:
        keys_values = tuple(take_rows(x, rows) for x in keys_values)
      x = add(self.cross_norm, attend_to_context)
    return add(self.mlp_norm, self.mlp), cache


class Transformer(nn.Module):
  """A stack of blocks, without a final norm.

  Parameters of all layers are stacked along a leading axis, whether the
  layers run as a loop or one after the other, so that a checkpoint fits
  either.

  Attributes:
    width: channels D.
    depth: number of blocks.
    num_heads: heads; must divide `width`.
    mlp_ratio: hidden width of the MLP over `width`.
    cross: whether blocks can attend to a context (of any width).
    cross_mlp: see `Block`.
    activation: a name in `ACTIVATIONS`.
    post_norm, epsilon, dropout: see `Block`.
    scheme: a name in `initializers.SCHEMES`.
    scan: run the layers as a loop (compiles once) or unrolled.
    remat: recompute activations in the backward pass: `none`, or a name in
      `REMAT_POLICIES`.
    dtype: of the matrix products.
    attention: see `Block`.
  """

  width: int
  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  cross: bool = False
  cross_mlp: bool = False
  activation: str = "gelu"
  post_norm: bool = False
  epsilon: float = 1e-5
  dropout: float = 0.0
  scheme: str = "clip"
  scan: bool = True
  remat: str = "none"
  dtype: Any = jnp.float32
  attention: str = "xla"

  def setup(self):
    if self.width % self.num_heads:
      raise ValueError(f"{self.num_heads} heads do not divide {self.width}")
    same = nn.broadcast
    stack = lift(
      Block, self, __call__=(same,) * 4 + (0, 0, same), project=(same,)
    )
    self.layers = stack(**block_fields(self))

  def __call__(
    self,
    x: jax.Array,
    mask: masks.Mask | jax.Array | None = None,
    context: jax.Array | None = None,
    context_mask: masks.Mask | jax.Array | None = None,
    keys_values: KeysValues | None = None,
    rows: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the stack.

    Args:
      x: `[B, T, D]`; or `[B, F, T, D]`, frames that attend as
        `ops.attention.attend_in_frames` says, without a mask or a context.
      mask: a `Mask`, which fused kernels can take, or bool `[B or 1, T, T]`,
        True = attend; None attends everywhere.
      context: `[B, S, D]`; None skips the cross-attention of every block.
      context_mask: the same, or bool `[B or 1, T or 1, S]`.
      keys_values: what `project` returned for a context, instead of it.
      rows: which row of `keys_values` each row of `x` attends to; see
        `take_rows`.

    Returns:
      What `x` is.
    """
    return self.layers(
      x, mask, context, context_mask, None, None, keys_values, rows
    )[0]

  def project(self, context: jax.Array) -> KeysValues:
    """Keys and values of a context in every layer: `[layers, B, S, N, H]`."""
    return self.layers.project(None, context)[1]

  def decode(
    self,
    x: jax.Array,
    cache: KeysValues,
    position: jax.Array,
    keys_values: KeysValues | None = None,
  ) -> tuple[jax.Array, KeysValues]:
    """Runs the stack on one more token of a causal sequence.

    Args:
      x: `[B, 1, D]`.
      cache: of `empty_cache`, or what the last call returned.
      position: int32 scalar, the token's place.
      keys_values: what `project` returned for the context, if any.

    Returns:
      `[B, 1, D]` and the new cache.
    """
    return self.layers(x, None, None, None, position, cache, keys_values, None)

  def empty_cache(self, batch_size: int, length: int) -> KeysValues:
    """Returns room for `length` tokens: two of `[layers, B, length, N, H]`."""
    heads = (self.num_heads, self.width // self.num_heads)
    shape = (self.depth, batch_size, length, *heads)
    return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)


def lift(
  block: type[nn.Module], stack: Transformer, **in_axes: tuple
) -> type[nn.Module]:
  """Makes one module of as many blocks as a stack has layers.

  Args:
    block: a module whose methods map a carry and further arguments to a carry
      and an output.
    stack: says how many, looped or not, and what is recomputed.
    **in_axes: a method's name, and the axes of layers of its arguments after
      the carry: 0, or `nn.broadcast` for those that all layers share.

  Returns:
    A class with the fields of `block`.
  """
  if stack.remat != "none":
    policy = REMAT_POLICIES[stack.remat]
    block = nn.remat(block, policy=policy, prevent_cse=not stack.scan)
  options = dict(
    variable_axes={
      "params": 0,
      "intermediates": 0,
      "self_attention": 0,
      "perturbations": 0,
    },
    split_rngs={"params": True, "dropout": True},
    length=stack.depth,
    unroll=1 if stack.scan else stack.depth,
  )
  methods = {k: dict(in_axes=axes, **options) for k, axes in in_axes.items()}
  return nn.scan(block, methods=methods)


def block_fields(stack: Transformer) -> dict[str, Any]:
  """Returns the fields of a stack's `Block`s."""
  branches = 2 + stack.cross + (stack.cross and stack.cross_mlp)
  return dict(
    num_heads=stack.num_heads,
    mlp_dim=int(stack.width * stack.mlp_ratio),
    inits=BlockInit(stack.scheme, stack.width, stack.depth * branches),
    cross=stack.cross,
    cross_mlp=stack.cross_mlp,
    activation=stack.activation,
    post_norm=stack.post_norm,
    epsilon=stack.epsilon,
    dropout=stack.dropout,
    dtype=stack.dtype,
    attention=stack.attention,
  )
