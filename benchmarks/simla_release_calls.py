"""SIMLA's step with the calls that its release makes.

The same modules, weights, draws and losses as `methods.simla`; what differs is
that each use of an encoder is a call of its own, thirteen in all, and that the
heads read every position (specified in Khan et al.'s release; ours is written
from its description).
"""

import jax
import jax.numpy as jnp

from vlp_jax.losses import distillation
from vlp_jax.methods._fusion import Embeddings
from vlp_jax.methods.base import Mean, Output
from vlp_jax.methods.simla import AXES, Simla
from vlp_jax.models.transformer import take_rows


class SimlaReleaseCalls(Simla):
  """Simla, call by call; without dropout."""

  def losses(self, params, batch, draws, targets, ctx) -> Output:
    """See `Simla.losses`."""
    text, text_len, words = batch["text"], batch["text_len"], draws.words
    alpha, ema = self.alpha_at(ctx.step), ctx.ema_params
    stop = jax.lax.stop_gradient

    def call(params, *args):
      return self.apply(params, *args)

    patches = call(params, "see", batch["image"])
    embedded = call(params, "embed_text", text)
    caption, _ = call(params, "read", embedded, text_len)
    teacher_patches = stop(call(ema, "see", batch["image"]))
    teacher_embedded = stop(call(ema, "embed_text", text))
    teacher_caption, _ = stop(call(ema, "read", teacher_embedded, text_len))
    student = Embeddings(call(params, "embed_image", patches), caption)
    teacher = Embeddings(
      stop(call(ema, "embed_image", teacher_patches)), teacher_caption
    )
    negatives = self.negatives(
      params, student, teacher, batch["image_id"], draws.noise
    )
    (pictures, _), (captions, _) = negatives
    positive = self.fuse_own(params, patches, embedded, text_len, None)
    others = take_rows(embedded, captions), take_rows(text_len, captions)
    both = self.fuse_own(
      params,
      jnp.concatenate([take_rows(patches, pictures), patches]),
      jnp.concatenate([embedded, others[0]]),
      jnp.concatenate([text_len, others[1]]),
      None,
    )
    terms, _ = self.match_terms(
      params, (positive, *jnp.split(both, 2)), negatives
    )
    hidden = call(params, "embed_text", words.text)
    filled = self.fuse_own(params, patches, hidden, text_len, None)
    teacher_hidden = stop(call(ema, "embed_text", words.text))
    teacher_filled = stop(
      self.fuse_own(ema, teacher_patches, teacher_hidden, text_len, None)
    )

    def at(logits, places):
      return jnp.take_along_axis(logits, places[..., None], axis=1)

    loss, _ = distillation.cross_entropy(
      at(call(params, "word_logits", filled), words.places),
      words.labels,
      stop(at(call(ema, "word_logits", teacher_filled), words.places)),
      alpha,
      axis=AXES[self.mlm_axis],
    )
    terms["mlm"] = Mean.of(loss, words.weights)
    context = embedded if self.patch_text == "student" else teacher_embedded
    masked_patches = call(params, "see", batch["image"], draws.patches)
    drawn = call(params, "image_given_text", masked_patches, embedded, text_len)
    teacher_masked = stop(call(ema, "see", batch["image"], draws.patches))
    teacher_drawn = call(
      ema, "image_given_text", teacher_masked, context, text_len
    )
    loss, _ = distillation.cross_entropy(
      call(params, "patch_logits", drawn[:, 1:]),
      targets,
      stop(call(ema, "patch_logits", teacher_drawn[:, 1:])),
      alpha,
    )
    terms["mim"] = Mean.of(loss, draws.patches.astype(jnp.float32))
    seen = patches if self.keyword_image == "student" else teacher_patches
    _, sown = self.apply(
      ema,
      "text_given_image",
      teacher_embedded,
      text_len,
      call(ema, "project", stop(seen)),
      jnp.zeros((len(text), 1), jnp.int32),
      mutable=["self_attention"],
    )
    layers = sown["self_attention"]["stream"]["transformer"]["layers"]
    (maps,) = layers["self_attention"]["map"]
    ids, counted = self._choose(stop(maps[-1, :, :, 0]), text, text_len)
    terms["psl"] = self._keyword_term(
      (params, patches), (ema, teacher_patches), ids, counted, alpha
    )
    return Output(self.share(student, teacher), terms, {})
