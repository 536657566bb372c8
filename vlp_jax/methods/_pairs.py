"""What evaluators ask of a method with a `models.SCLEncoder`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vlp_jax.methods.base import Batch, ModuleMethod, Params
from vlp_jax.models.two_stream import Seen
from vlp_jax.ops import masks


@dataclasses.dataclass(frozen=True)
class PairMethod(ModuleMethod):
  """The capabilities of such a method; pictures may be clips."""

  def match_state(self, params: Params, batch: Batch) -> Seen:
    """Encodes pictures alone: all that fusion needs of them."""
    patches = self.apply(params, "embed", batch["image"])
    return self.apply(params, "see", patches)

  def match_score(self, params: Params, state, text, text_len) -> jax.Array:
    """Log-odds that texts belong to pictures.

    Args:
      params: parameters.
      state: of `match_state`, B pictures.
      text: int32 `[B, K, L]`.
      text_len: int32 `[B, K]`.

    Returns:
      float32 `[B, K]`.
    """
    size = text_len.shape
    text, text_len = text.reshape(-1, text.shape[-1]), text_len.reshape(-1)
    state = jax.tree.map(lambda x: jnp.repeat(x, size[1], axis=0), state)
    tokens = self.apply(params, "read", text, text_len)
    fused = self.apply(params, "fuse", tokens, text_len, state)
    logits = self.apply(params, "match_logits", *fused)
    return (logits[:, 1] - logits[:, 0]).reshape(size)

  @property
  def readouts(self) -> tuple[str, ...]:
    """The maps that `patch_text_map` can make."""
    return ("cross_attention",)

  def patch_text_map(
    self,
    params: Params,
    batch: Batch,
    readout: str = "cross_attention",
    token_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Says where in a picture a text is.

    Cross-attention of the last layer, of the head that looks most.

    Args:
      params: parameters.
      batch: `image` (of clips, the mean of the frames' maps), `text` and
        `text_len`.
      readout: `cross_attention`.
      token_mask: bool `[B, L]`, the tokens whose maps are added; None takes
        the first token, which stands for the whole text.

    Returns:
      float32 `[B, rows, columns]`; only the order of its values has meaning.
    """
    del readout
    text, text_len = batch["text"], batch["text_len"]
    tokens = self.apply(params, "read", text, text_len)
    seen = self.match_state(params, batch)
    _, sown = self.apply(
      params, "fuse", tokens, text_len, seen, mutable=["intermediates"]
    )
    layers = sown["intermediates"]["fusion"]["layers"]["text"]
    (maps,) = layers["attention_map"]  # [layers, B, heads, L, F + F N]
    found = jnp.max(maps[-1], axis=1)
    rows = jnp.arange(text.shape[1])[None] == 0
    if token_mask is not None:
      rows = token_mask & masks.valid(text_len, text.shape[1])
    found = jnp.einsum("bls,bl->bs", found, rows.astype(jnp.float32))
    return self._grid(found[:, seen.frames.shape[1] :], batch)
