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

    Args:
      params: parameters.
      batch: `image`, `text` and `text_len`.
      readout: `cross_attention`, that of `attention_maps`.
      token_mask: bool `[B, L]`, the tokens whose maps are added; None takes
        the first token, which stands for the whole text.

    Returns:
      float32 `[B, rows, columns]`, of clips `[B, F, rows, columns]`; only the
      order of its values has meaning.
    """
    del readout
    maps = self.attention_maps(params, batch)
    rows = jnp.arange(maps.shape[1])[None] == 0
    if token_mask is not None:
      rows = token_mask & masks.valid(batch["text_len"], maps.shape[1])
    maps = jnp.einsum("blfyx,bl->bfyx", maps, rows.astype(jnp.float32))
    return maps if batch["image"].ndim == 5 else maps[:, 0]

  def attention_maps(self, params: Params, batch: Batch) -> jax.Array:
    """Says where each token of a text looks.

    Cross-attention of the text's last layer, of the head that looks most, to
    patches; what goes to frame tokens is left out.

    Args:
      params: parameters.
      batch: `image`, `text` and `text_len`.

    Returns:
      float32 `[B, L, F, rows, columns]`, not negative; of pictures F is 1.
    """
    text, text_len = batch["text"], batch["text_len"]
    tokens = self.apply(params, "read", text, text_len)
    seen = self.match_state(params, batch)
    _, sown = self.apply(
      params, "fuse", tokens, text_len, seen, mutable=["intermediates"]
    )
    layers = sown["intermediates"]["fusion"]["layers"]["text"]
    (maps,) = layers["attention_map"]  # [layers, B, heads, L, F + F N]
    frames = seen.frames.shape[1]
    return self._frames(jnp.max(maps[-1], axis=1)[..., frames:], batch)
