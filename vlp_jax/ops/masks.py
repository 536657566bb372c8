"""Attention masks. One convention everywhere: True = attend, or keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """A mask by what it means; fused kernels take it without an array.

  Attributes:
    lengths: int32 `[B]`: nothing attends to keys from there on; None has no
      such keys. Where nothing is left to attend to, the output means nothing.
    causal: whether token t attends to the tokens 0 to t only.
  """

  lengths: jax.Array | None = None
  causal: bool = dataclasses.field(default=False, metadata={"static": True})


def dense(mask: Mask | jax.Array | None, size: int) -> jax.Array | None:
  """Returns a mask of `size` keys as an array, bool `[B or 1, T or 1, S]`.

  What is an array, or None (everything is attended to), stays what it is.
  """
  if not isinstance(mask, Mask):
    return mask
  parts = [causal(size)] if mask.causal else []
  if mask.lengths is not None:
    parts.append(valid(mask.lengths, size)[:, None])
  return functools.reduce(jnp.logical_and, parts) if parts else None


def valid(length: jax.Array, size: int) -> jax.Array:
  """Returns bool `[B, size]`: True at positions before `length` (int `[B]`)."""
  return jnp.arange(size) < length[:, None]


def causal(size: int) -> jax.Array:
  """Returns bool `[1, size, size]`: row t attends to columns 0 to t."""
  return jnp.tril(jnp.ones((size, size), bool))[None]


def causal_with_cls(
  text_len: jax.Array, size: int, *, legacy: bool = False
) -> jax.Array:
  """Returns the mask of a causal text tower whose [CLS] comes last.

  Real tokens attend to what precedes them. [CLS] attends to the real tokens
  and to itself. `legacy` is what open_clip trains with: its key mask is
  shifted by one, so that [CLS] sees the first pad and, unless the caption
  fills all positions, not itself (open_clip issue 549).

  Args:
    text_len: int `[B]`, number of real tokens.
    size: number of tokens without [CLS], L.
    legacy: whether to reproduce open_clip's mask.

  Returns:
    bool `[B, L + 1, L + 1]`.
  """
  if legacy:
    keys = valid(text_len + 1, size + 1)
  else:
    cls = jnp.ones((text_len.shape[0], 1), bool)
    keys = jnp.concatenate([valid(text_len, size), cls], axis=1)
  is_cls = jnp.arange(size + 1) == size
  # Only the [CLS] row needs the key mask: pads come after all real tokens.
  return causal(size + 1) & (keys[:, None, :] | ~is_cls[None, :, None])
