"""ALBEF: align before fuse, with a momentum teacher.

Li et al. 2021, "Align before fuse: vision and language representation learning
with momentum distillation", NeurIPS 2021, arXiv 2107.07651. Pictures and texts
are first aligned by contrast, then fused by cross-attention, which learns to
tell pairs from hard negatives and to fill in hidden words.

Map from the paper to code:
  equations 1, 6   ITC, with the teacher's part    `FusionMethod.couple`
  equations 2, 7   MLM, with the teacher's part    `FusionMethod.word_terms`
  equation 4       ITM, hard negatives of 3.2      `FusionMethod.match_terms`
  equation 5       their sum                       `term_weights`
  section 3.4      the teacher's weight            `FusionMethod.alpha_at`

Differences, each a field: pairs of the same picture are no negatives
(`same_image`), negatives come from the whole batch (`match_group`; 64 in the
release), the teacher runs without dropout (`teacher_dropout`).
"""

import dataclasses

from vlp_jax.methods import _towers
from vlp_jax.methods._fusion import Embeddings, FusionMethod
from vlp_jax.methods._matcher import shorten, stack_rows, unstack_rows
from vlp_jax.methods.base import Output
from vlp_jax.models.fusion import FusionEncoder


@dataclasses.dataclass(frozen=True)
class Albef(FusionMethod):
  """See the module's docstring; its fields are `FusionMethod`'s."""

  def forward(self, params, batch, ctx) -> Output:
    text, text_len = shorten(batch["text"], batch["text_len"])
    batch = {**batch, "text": text, "text_len": text_len}
    key, teacher_key = self.dropout_keys(ctx)
    words = self.hide_words(batch, ctx)

    def encode(params, key):
      """Each tower once, captions with and without hidden words together."""
      patches = self.apply(params, "see", batch["image"])
      embedded = self.apply(
        params, "embed_text", stack_rows(text, words.text), dropout=key(0)
      )
      embeddings, tokens = self.apply(
        params, "read", embedded, stack_rows(text_len, text_len), dropout=key(1)
      )
      image = self.apply(params, "embed_image", patches)
      embeddings = Embeddings(image, unstack_rows(embeddings, 2)[0])
      return embeddings, patches, *unstack_rows(tokens, 2)

    student, patches, tokens, hidden = encode(params, key)
    teacher, teacher_patches, _, teacher_hidden = encode(
      ctx.ema_params, teacher_key
    )
    negatives = self.negatives(
      params,
      student,
      teacher,
      batch["image_id"],
      self.negative_noise(batch, ctx),
    )
    fused = self.fuse(
      params, patches, tokens, hidden, text_len, negatives, key(2)
    )
    teacher_fused = self.fuse_own(
      ctx.ema_params, teacher_patches, teacher_hidden, text_len, teacher_key(2)
    )
    match, match_report = self.match_terms(params, fused, negatives)
    word, word_report = self.word_terms(
      params, fused[3], (ctx.ema_params, teacher_fused), words, ctx
    )
    return Output(
      self.share(student, teacher),
      match | word,
      match_report | word_report,
    )

  def term_weights(self, step) -> dict[str, float]:
    del step
    return {"itc": 1.0, "itm": 1.0, "mlm": 1.0}


def build(config) -> Albef:
  """Builds ALBEF from `config.model` and `config.method`."""
  options = _towers.fusion_options(config)
  return Albef(FusionEncoder(**_towers.fusion(config)), **options)
