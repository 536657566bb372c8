"""Scaled dot-product attention, by XLA or by a fused kernel."""

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.ops import contexts, platforms
from vlp_jax.ops.dropout import Drop
from vlp_jax.ops.masks import Mask, dense

# Large enough to vanish in a softmax, finite so that a row with nothing to
# attend to (an empty caption) gives numbers and not NaN.
MASKED = -1e30
KERNELS = ("auto", "xla", "cudnn", "tpu")

Through = Callable[[jax.Array], jax.Array]


class Choice(NamedTuple):
  """What computes attention at one place, and why."""

  kernel: str
  reason: str


_choices = contextvars.ContextVar("choices", default=None)
_by_xla = contextvars.ContextVar("by_xla", default=False)


def choose(
  kernel: str,
  on: str,
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  mask: Mask | jax.Array | None,
  *,
  dropped: bool,
  through: bool,
  read: bool,
) -> Choice:
  """Chooses what computes attention at one place.

  Args:
    kernel: what is asked for, of `KERNELS`.
    on: what `platforms.platform` returns.
    q_BTNH: the queries, or their shape and dtype.
    k_BSNH: the keys, or theirs.
    mask: as for `attend`.
    dropped: whether probabilities are dropped.
    through: whether the probabilities go through something else.
    read: whether the probabilities are asked for.

  Returns:
    Which kernel. What is asked for is XLA where another one cannot do it.
  """
  if kernel == "auto":
    # The TPU's pays by XLA's estimates, but no TPU has run it.
    kernel = "cudnn" if on == "cuda" else "xla"
  if kernel == "xla":
    return Choice("xla", on)
  if through:
    return Choice("xla", "its probabilities are perturbed")
  if read:
    return Choice("xla", "its probabilities are read")
  if mask is not None and not isinstance(mask, Mask):
    return Choice("xla", "its mask is more than causal or lengths")
  if dropped and kernel == "cudnn":
    return Choice("xla", "its probabilities are dropped")
  fits = _tpu_problem if kernel == "tpu" else _cudnn_problem
  problem = fits(q_BTNH, k_BSNH)
  return Choice("xla", problem) if problem else Choice(kernel, on)


def _cudnn_problem(q_BTNH: jax.Array, _) -> str:
  size, dtype = q_BTNH.shape[-1], jnp.dtype(q_BTNH.dtype)
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cudnn takes no {dtype}"
  if size % 8 or size > 128:
    return f"cudnn takes no heads of {size} channels"
  return ""


def _tpu_problem(q_BTNH: jax.Array, k_BSNH: jax.Array) -> str:
  from vlp_jax.ops import tpu_attention  # Pallas takes long to import

  return tpu_attention.problem(q_BTNH, k_BSNH)


def choices() -> AbstractContextManager[dict[Choice, None]]:
  """Collects, in order, the choices of what is traced in the context."""
  return contexts.within(_choices, {})


def by_xla() -> AbstractContextManager[bool]:
  """Has XLA compute all attention that is traced in the context.

  For what looks at products one by one, which a kernel hides.
  """
  return contexts.within(_by_xla, True)


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask: Mask | jax.Array | None = None,
  *,
  dropout: Drop | None = None,
  through: Through | None = None,
  read: bool = True,
  kernel: str = "xla",
) -> tuple[jax.Array, jax.Array | None]:
  """Attends with scores and softmax in float32.

  Args:
    q_BTNH: queries; N heads of H channels.
    k_BSNH: keys.
    v_BSNH: values.
    mask: a `Mask`, or bool `[B or 1, T or 1, S]`, True = attend; None attends
      everywhere.
    dropout: of the probabilities; a kernel drops others than XLA, as many.
    through: what the probabilities go through then, before they weigh the
      values.
    read: whether the caller reads the probabilities.
    kernel: of `KERNELS`; see `choose`.

  Returns:
    The output `[B, T, N, H]` in the dtype of `v`, and the probabilities
    `[B, N, T, S]` as the softmax made them, float32 (not computed twice, and
    free when unused); None if a fused kernel was chosen, which has none.
  """
  choice = choose(
    "xla" if _by_xla.get() else kernel,
    platforms.platform(),
    q_BTNH,
    k_BSNH,
    mask,
    dropped=dropout is not None,
    through=through is not None,
    read=read,
  )
  if (found := _choices.get()) is not None:
    found[choice] = None
  if choice.kernel == "cudnn":
    return _cudnn(q_BTNH, k_BSNH, v_BSNH, mask or Mask()), None
  if choice.kernel == "tpu":
    from vlp_jax.ops import tpu_attention

    out = tpu_attention.attend(q_BTNH, k_BSNH, v_BSNH, mask or Mask(), dropout)
    return out, None
  mask_BTS = dense(mask, k_BSNH.shape[1])
  scale = q_BTNH.shape[-1] ** -0.5
  s_BNTS = jnp.einsum(
    "BTNH,BSNH->BNTS",
    q_BTNH * scale,
    k_BSNH,
    preferred_element_type=jnp.float32,
  )
  if mask_BTS is not None:
    s_BNTS = jnp.where(mask_BTS[:, None], s_BNTS, MASKED)
  p_BNTS = jax.nn.softmax(s_BNTS, axis=-1)
  weights = p_BNTS if dropout is None else dropout(p_BNTS)
  weights = weights if through is None else through(weights)
  o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v_BSNH.dtype), v_BSNH)
  return o_BTNH, p_BNTS


def _cudnn(
  q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, mask: Mask
) -> jax.Array:
  """Attends by cuDNN's flash attention, without a bias.

  Where all keys are masked the first one is read.
  """
  b, t = q_BTNH.shape[:2]
  size, lengths = k_BSNH.shape[1], mask.lengths
  if lengths is None and size % 2 and not mask.causal:
    lengths = jnp.full((b,), size)  # hides the key that `_even` adds
  if lengths is not None:
    lengths = jnp.clip(lengths, 1, size).astype(jnp.int32)
  out = jax.nn.dot_product_attention(
    *map(_even, (q_BTNH, k_BSNH, v_BSNH)),
    is_causal=mask.causal,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return out[:, :t]


def _even(x: jax.Array) -> jax.Array:
  """Adds a token if their number is odd.

  Gradients want even T and S where there is a bias, and jax (0.10 to 0.12)
  takes the empty array that stands for none for one.
  """
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def attend_in_frames(
  q_BFTNH: jax.Array,
  k_BFTNH: jax.Array,
  v_BFTNH: jax.Array,
  dropout: Drop | None = None,
  **options,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
  """Attends inside of frames, and from each frame's first token to them all.

  The first token of a frame attends to every token of every frame, the others
  to the tokens of their own frame, the first one included: no pair of patches
  of two frames is ever scored (Ji et al. 2023, SCL's flexible encoder).

  Args:
    q_BFTNH: queries of F frames of T tokens.
    k_BFTNH: keys.
    v_BFTNH: values.
    dropout: of the probabilities.
    **options: `through`, `read`, `kernel`, as for `attend`.

  Returns:
    The output `[B, F, T, N, H]`, and the probabilities of the first tokens
    `[B, N, F, F T]` and of the others `[B F, N, T - 1, T]`; None if a fused
    kernel was chosen.
  """
  b, f = q_BFTNH.shape[:2]

  def merge(x, *leading):
    return x.reshape(*leading, *x.shape[-2:])

  drop_first, drop_rest = dropout.split() if dropout else (None, None)
  first, p_first = attend(
    q_BFTNH[:, :, 0],
    *(merge(x, b, -1) for x in (k_BFTNH, v_BFTNH)),
    dropout=drop_first,
    **options,
  )
  size = q_BFTNH.shape[2]
  rest, p_rest = attend(
    merge(q_BFTNH[:, :, 1:], b * f, size - 1),
    *(merge(x, b * f, size) for x in (k_BFTNH, v_BFTNH)),
    dropout=drop_rest,
    **options,
  )
  rest = merge(rest, b, f, size - 1)
  probabilities = None if p_rest is None else (p_first, p_rest)
  return jnp.concatenate([first[:, :, None], rest], 2), probabilities
