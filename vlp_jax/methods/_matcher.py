"""What evaluators ask of a method with a `models.FusionEncoder`.

Embeddings; how well a text and a picture match; and where in a picture a text
is (ALBEF, Li et al. 2021, section 6.4).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vlp_jax.methods.base import Batch, ModuleMethod, Params
from vlp_jax.ops import masks


@dataclasses.dataclass(frozen=True)
class Matcher(ModuleMethod):
  """The capabilities of such a method.

  Attributes:
    grounding_layer: whose cross-attention `patch_text_map` reads, from 0.
  """

  grounding_layer: int

  def encode_text(self, params: Params, batch: Batch) -> jax.Array:
    """Embeds `batch["text"]`: float32 `[B, E]`, of unit length."""
    text, text_len = shorten(batch["text"], batch["text_len"])
    return self.apply(params, "encode_text", text, text_len)

  def match_state(self, params: Params, batch: Batch):
    """Keys and values of pictures or clips: `[B, layers, S, heads, H]` twice.

    S is F (1 + N), each frame's [CLS] first; of a picture F is 1.
    """
    patches = self.apply(params, "see", batch["image"])
    keys_values = self.apply(params, "project", patches)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), keys_values)

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
    keys_values = jax.tree.map(lambda x: x.swapaxes(0, 1), state)
    size = text_len.shape
    text, text_len = shorten(
      text.reshape(-1, text.shape[-1]), text_len.reshape(-1)
    )
    rows = jnp.zeros(size, jnp.int32)  # each group is one picture
    fused = self.apply(params, "fuse", text, text_len, keys_values, rows)
    logits = self.apply(params, "match_logits", fused)
    return (logits[:, 1] - logits[:, 0]).reshape(size)

  @property
  def readouts(self) -> tuple[str, ...]:
    """The maps that `patch_text_map` can make."""
    return ("gradcam",)

  def patch_text_map(
    self,
    params: Params,
    batch: Batch,
    readout: str = "gradcam",
    token_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Says where in a picture a text is (ALBEF, section 6.4).

    Cross-attention of one layer, times the gradient of the match logit with
    respect to it where that is positive (Grad-CAM, Selvaraju et al. 2017),
    averaged over heads and tokens.

    Args:
      params: parameters.
      batch: `image`, `text` and `text_len`.
      readout: `gradcam`.
      token_mask: bool `[B, L]`, the tokens that are averaged over; None takes
        all real ones.

    Returns:
      float32 `[B, rows, columns]`, of clips `[B, F, rows, columns]`; only the
      order of its values has meaning.
    """
    del readout
    text, text_len = shorten(batch["text"], batch["text_len"])
    attention, gradient = self.attention_gradient(
      params, batch["image"], text, text_len
    )
    cam = attention * jax.nn.relu(gradient)
    frames = batch["image"].shape[1] if batch["image"].ndim == 5 else 1
    cam = jnp.mean(cam, axis=1)[:, :, frames:]  # heads; each frame's [CLS]
    weights = masks.valid(text_len, text.shape[1])
    if token_mask is not None:
      weights &= token_mask[:, : text.shape[1]]
    cam = jnp.einsum("bln,bl->bn", cam, weights.astype(jnp.float32))
    return self._map(cam, batch)

  def attention_maps(self, params: Params, batch: Batch) -> jax.Array:
    """Says where each token of a text looks.

    Cross-attention of the last layer, of the head that looks most, to patches;
    what goes to a frame's [CLS] is left out.

    Args:
      params: parameters.
      batch: `image`, `text` and `text_len`.

    Returns:
      float32 `[B, L - 1, F, rows, columns]`, not negative; of pictures F is 1.
      The end symbol, which has no place in these texts, has no map.
    """
    image = batch["image"]
    text, text_len = shorten(batch["text"], batch["text_len"])
    patches = self.apply(params, "see", image)
    keys_values = self.apply(params, "project", patches)
    rows = jnp.zeros((len(text), 1), jnp.int32)
    _, sown = self.apply(
      params,
      "fuse",
      text,
      text_len,
      keys_values,
      rows,
      mutable=["intermediates"],
    )
    layers = sown["intermediates"]["stream"]["transformer"]["layers"]
    (maps,) = layers["attention_map"]  # [layers, B, heads, L - 1, F + F N]
    frames = image.shape[1] if image.ndim == 5 else 1
    return self._frames(jnp.max(maps[-1], axis=1)[..., frames:], batch)

  def attention_gradient(self, params, image, text, text_len, delta=None):
    """Returns cross-attention of `grounding_layer`, and its gradient.

    Args:
      params: parameters.
      image: uint8 `[B, H, W, 3]`, or `[B, F, H, W, 3]`.
      text: int32 `[B, L]`, without an end symbol.
      text_len: int32 `[B]`.
      delta: `[layers, B, heads, L, S]`, added to the probabilities, with S as
        in `match_state`; None adds nothing.

    Returns:
      `[B, heads, L, S]` each: the probabilities before `delta`, and the
      gradient of each pair's logit of a match.
    """
    patches = self.apply(params, "see", image)
    keys_values = self.apply(params, "project", patches)
    rows = jnp.zeros((len(text), 1), jnp.int32)
    stack = self.module.stream.transformer
    if delta is None:
      heads = (stack.num_heads, text.shape[1], patches.shape[1])
      delta = jnp.zeros((stack.depth, len(text), *heads))
    path = ("stream", "transformer", "layers", "cross_attention")

    def logit(delta):
      perturbations = {"attention_map": delta}
      for name in reversed(path):
        perturbations = {name: perturbations}
      fused, sown = self.module.apply(
        {"params": params, "perturbations": perturbations},
        text,
        text_len,
        keys_values,
        rows,
        method="fuse",
        mutable=["intermediates"],
      )
      (maps,) = sown["intermediates"]["stream"]["transformer"]["layers"][
        "attention_map"
      ]
      return jnp.sum(self.apply(params, "match_logits", fused)[:, 1]), maps

    gradient, maps = jax.grad(logit, has_aux=True)(delta)
    return maps[self.grounding_layer], gradient[self.grounding_layer]


def shorten(text: jax.Array, text_len: jax.Array):
  """Drops the end symbol: ALBEF's and SIMLA's texts are [CLS] and words.

  Args:
    text: int32 `[B, L]`, ending with an end symbol each.
    text_len: int32 `[B]`.

  Returns:
    int32 `[B, L - 1]` and `[B]`; an empty row keeps one token.
  """
  text_len = jnp.maximum(text_len - 1, 1)
  real = masks.valid(text_len, text.shape[1] - 1)
  return jnp.where(real, text[:, :-1], 0), text_len


def stack_rows(*arrays: jax.Array) -> jax.Array:
  """Puts `[B, ...]` arrays side by side: `[len(arrays) B, ...]`.

  All of an example's rows follow one another, so that no device's move.
  """
  return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def unstack_rows(array: jax.Array, number: int) -> tuple[jax.Array, ...]:
  """The inverse of `stack_rows`: `number` arrays `[B, ...]`."""
  array = array.reshape(-1, number, *array.shape[1:])
  return tuple(array[:, i] for i in range(number))
