"""SCL's step with the calls that its release makes.

The same modules, weights, draws and losses as `methods.scl`; what differs is
that every loss encodes its text and its picture anew, as the release's do, and
that MLM's head reads every position.

  loss      text    picture                  fusion
  ITM       whole   own or other             full
  MLM       hidden  own                      full
  CL        whole   own                      none
  MVSC, A   whole   a fifth of its patches   short
  MLSC, B   part    own                      full
  MLTC, C   whole   with [MASK] patches      full

A and B are made for either completion, C for GLSCL alone.
"""

import jax
import jax.numpy as jnp

from vlp_jax.methods.base import Mean, Output
from vlp_jax.methods.scl import Scl
from vlp_jax.models.captioner import unit
from vlp_jax.ops import masking


class SclReleaseCalls(Scl):
  """Scl, loss by loss; without dropout."""

  def losses(self, params, batch, draws, ctx) -> Output:
    """See `Scl.losses`."""
    del ctx
    image, text, text_len = batch["image"], batch["text"], batch["text_len"]
    ids = batch["image_id"]

    def call(name, *args):
      return self.apply(params, name, *args)

    def fuse(text, image, keep=None, hidden=None):
      seen = call("see", call("embed", image, hidden), keep)
      return call("fuse", call("read", text, text_len), text_len, seen)

    shared = {
      "image": call("encode_image", image),
      "text": call("encode_text", text, text_len),
    }
    shown, match = self._pair(params, image, shared, batch, draws)
    terms, _ = self._match_terms(params, fuse(text, shown), match)
    terms["mlm"] = self._every_word(
      params, fuse(draws.words.text, image), draws
    )
    sides = self.vision_weight or self.language_weight or self.token_weight
    if sides:
      whole, image_part = fuse(text, image, draws.keep)
    if sides or self.patch_weight:
      text_part, complete = fuse(draws.part.text, image)
    if sides:
      shared |= {
        "image_part": unit(image_part.frames),
        "image_whole": unit(complete.frames),
        "text_part": unit(text_part[:, 0]),
        "text_whole": unit(whole[:, 0]),
      }
    if self.token_weight:
      places, weights = draws.part.places, draws.part.weights
      rows = (masking.take(x, places) for x in (text_part, whole))
      terms["token"] = self._token_term(*rows, weights, ids)
    if self.patch_weight:
      hidden = masking.scatter_mask(draws.patches, self._patches)
      if image.ndim == 5:
        hidden = jnp.repeat(hidden[:, None], image.shape[1], axis=1)
      _, covered = fuse(text, image, hidden=hidden)
      rows = [x.patches_at(draws.patches) for x in (covered, complete)]
      weights = jnp.ones(rows[0].shape[:2])
      terms["patch"] = self._token_term(*rows, weights, ids)
    return Output(shared, terms, {})

  @property
  def _patches(self) -> int:
    rows, columns = self.module.vision.grid
    return rows * columns

  def _every_word(self, params, fused, draws):
    """MLM, with logits of every position."""
    words = draws.words
    log_p = jax.nn.log_softmax(self.apply(params, "word_logits", fused[0]))
    log_p = masking.take(log_p, words.places)
    loss = -jnp.take_along_axis(log_p, words.labels[..., None], -1)[..., 0]
    return Mean.of(loss, words.weights)
