"""SIMLA: alignment at three levels, with one encoder used in three ways.

Khan et al. 2022, "Single-stream multi-level alignment for vision-language
pretraining", ECCV 2022, arXiv 2203.14395. To ALBEF's contrast (whole picture
and text), matching and hidden words it adds hidden patches, predicted from the
text (tokens), and keywords of the caption, predicted from the picture
(concepts). The layers that let words look at patches are those that let
patches look at words.

Map from the paper to code:
  equations 1-4    ITC, with the teacher's part     `FusionMethod.couple`
  equation 5       ITM                              `FusionMethod.match_terms`
  equation 6       XMM, hidden words (MLM)          `FusionMethod.word_terms`
  equation 7       XMM, hidden patches (MIM)        `_patch_terms`
  equations 8, 9   PSL, pseudo-labelled keywords    `_keyword_term`
  equation 10      their sum                        `term_weights`

The release differs from the paper, and from what is right, in places. Each is
a field; `configs/simla.py:reference` sets them all:

  field              release    default     what it says
  mlm_axis           sequence   vocabulary  soft MLM is normalised over
  keyword_specials   true       false       [CLS] and pads can take a keyword's
                                            place
  num_keywords       5          4           positions with most votes
  keyword_feature    embedding  embedding   what predicts the keywords; in the
                                            paper, the picture's [CLS]
  keyword_image      student    teacher     whose patches the teacher looks at
  patch_text         student    teacher     whose embeddings the teacher's
                                            patches look at
  same_image         false      true        same pictures are no negatives
  teacher_dropout    true       false       dropout in the teacher
  match_group        64         all         examples that share negatives
  optimizer          tokens,    (none)      what decays beside matrices; tokens
   .decay_also       temperature            are positions and [CLS], too
  schedule.stairs    30         0           the rate falls once an epoch

Not reproduced: each of its GPUs contrasts its own 64 pairs; here it is all 512.
The tokenizer of patches always sees the student's own crop (in the release
another one, drawn by itself, so that codes and patches do not match), and
captions have no end symbol, as in the release.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.errors import UserError
from vlp_jax.losses import distillation, keywords, masked
from vlp_jax.methods import _towers
from vlp_jax.methods._fusion import Embeddings, FusionMethod
from vlp_jax.methods._matcher import shorten, stack_rows, unstack_rows
from vlp_jax.methods.base import Mean, Output
from vlp_jax.models.fusion import GroundedEncoder
from vlp_jax.models.heads import Projection
from vlp_jax.ops import block_mask, masking
from vlp_jax.ops.token_mask import HiddenWords

AXES = {"vocabulary": -1, "sequence": 1}
NETWORKS = ("student", "teacher")
KEYWORD_FEATURES = ("embedding", "cls")


class Draws(NamedTuple):
  """What chance decides in a step.

  Attributes:
    words: the hidden words.
    patches: bool `[B, N]`, the hidden patches.
    noise: of the hard negatives, `[2, B, g]`.
  """

  words: HiddenWords
  patches: jax.Array
  noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Simla(FusionMethod):
  """See the module's docstring.

  Attributes:
    word_weight, patch_weight, keyword_weight: of MLM, MIM and PSL; a term is
      not computed where it is 0.
    visual_tokenizer: makes the codes of patches; None predicts their pixels.
    mask_patches: number of patches that are hidden, at most.
    mask_block: number of patches that a hidden block has at least.
    mlm_axis: see above, as the next five.
    stop_ids: ids that are never keywords.
  """

  word_weight: float = 1.0
  patch_weight: float = 1.0
  keyword_weight: float = 1.0
  visual_tokenizer: object | None = None
  mask_patches: int = 75
  mask_block: int = 16
  mlm_axis: str = "vocabulary"
  keyword_specials: bool = False
  num_keywords: int = 4
  keyword_image: str = "teacher"
  patch_text: str = "teacher"
  stop_ids: tuple[int, ...] = ()

  def init(self, key, batch):
    params, state = super().init(key, batch)
    if self.visual_tokenizer is not None:
      state = {**state, "visual_tokenizer": self.visual_tokenizer.empty()}
    return params, state

  def start(self, params, method_state, pictures):
    """Fits or loads the visual tokenizer."""
    params, method_state = super().start(params, method_state, pictures)
    if self.visual_tokenizer is not None and self.patch_weight:
      state = self.visual_tokenizer.start(pictures)
      method_state = {**method_state, "visual_tokenizer": state}
    return params, method_state

  def forward(self, params, batch, ctx) -> Output:
    text, text_len = shorten(batch["text"], batch["text_len"])
    batch = {**batch, "text": text, "text_len": text_len}
    grid = self.module.vision.grid
    block = (self.mask_patches, self.mask_block)
    key = ctx.rngs["patch_mask"]
    draws = Draws(
      self.hide_words(batch, ctx, self.mlm_axis == "sequence"),
      block_mask.draw(key, batch["index"], grid, *block),
      self.negative_noise(batch, ctx),
    )
    return self.losses(params, batch, draws, self._targets(batch, ctx), ctx)

  def losses(self, params, batch, draws, targets, ctx) -> Output:
    """The step, in eight encoder calls: each kind once for each network.

    Args:
      params: parameters.
      batch: with `shorten`ed captions.
      draws: what chance decided.
      targets: of the patches: codes int32 `[B, N]` or pixels `[B, N, P]`.
      ctx: of the step.
    """
    text, text_len, words = batch["text"], batch["text_len"], draws.words
    alpha, ema = self.alpha_at(ctx.step), ctx.ema_params
    key, teacher_key = self.dropout_keys(ctx)

    def encode(params, key):
      """Pictures, with and without hidden patches; captions by themselves."""
      patches = self._see(params, batch["image"], draws.patches)
      texts = (text, words.text) if self.word_weight else (text,)
      embedded, *hidden = unstack_rows(
        self.apply(params, "embed_text", stack_rows(*texts), dropout=key(0)),
        len(texts),
      )
      hidden = hidden[0] if hidden else None
      caption, _ = self.apply(
        params, "read", embedded, text_len, dropout=key(1)
      )
      image = self.apply(params, "embed_image", patches[0])
      return Embeddings(image, caption), *patches, embedded, hidden

    student, patches, masked_patches, embedded, hidden = encode(params, key)
    (
      teacher,
      teacher_patches,
      teacher_masked,
      teacher_embedded,
      teacher_hidden,
    ) = jax.lax.stop_gradient(encode(ema, teacher_key))
    negatives = self.negatives(
      params, student, teacher, batch["image_id"], draws.noise
    )
    fused = self.fuse(
      params, patches, embedded, hidden, text_len, negatives, key(2)
    )
    # The teacher fills in words, and shows the words that it looks at.
    seen = patches if self.keyword_image == "student" else teacher_patches
    teacher_fused, attention = self._teach(
      ema,
      (teacher_patches, teacher_hidden) if self.word_weight else None,
      (seen, teacher_embedded) if self.keyword_weight else None,
      text_len,
      teacher_key(2),
    )
    terms, report = self.match_terms(params, fused, negatives)
    if self.word_weight:
      word, word_report = self.word_terms(
        params,
        fused[3],
        (ema, teacher_fused),
        words,
        ctx,
        axis=AXES[self.mlm_axis],
      )
      terms, report = terms | word, report | word_report
    if self.patch_weight:
      context = embedded if self.patch_text == "student" else teacher_embedded
      patch, patch_report = self._patch_terms(
        (params, masked_patches, embedded, key(3)),
        (ema, teacher_masked, context, teacher_key(3)),
        text_len,
        draws.patches,
        targets,
        alpha,
      )
      terms, report = terms | patch, report | patch_report
    if self.keyword_weight:
      ids, counted = self._choose(attention, text, text_len)
      terms["psl"] = self._keyword_term(
        (params, patches), (ema, teacher_patches), ids, counted, alpha
      )
    return Output(self.share(student, teacher), terms, report)

  def term_weights(self, step) -> dict[str, float]:
    del step
    weights = {"itc": 1.0, "itm": 1.0}
    if self.word_weight:
      weights["mlm"] = self.word_weight
    if self.patch_weight:
      weights["mim"] = self.patch_weight
    if self.keyword_weight:
      weights["psl"] = self.keyword_weight
    return weights

  def _see(self, params, image, hidden):
    """Encodes pictures whole and, if that is asked for, with hidden patches."""
    if not self.patch_weight:
      return self.apply(params, "see", image), None
    both = stack_rows(jnp.zeros_like(hidden), hidden)
    return unstack_rows(
      self.apply(params, "see", stack_rows(image, image), both), 2
    )

  def _teach(self, ema, hidden, whole, text_len, key):
    """Runs the teacher on captions with hidden words, and on whole ones.

    Args:
      ema: the teacher's parameters.
      hidden: patches, and embedded captions with hidden words; None if they
        are not to be run.
      whole: patches, and embedded captions; or None.
      text_len: int32 `[B]`.
      key: of dropout, or None.

    Returns:
      `[B, L, D]`, of the hidden ones; and what the first token of the whole
      ones attends to in the last layer, `[B, heads, L]`. None for what was not
      run.
    """
    passes = [x for x in (hidden, whole) if x is not None]
    if not passes:
      return None, None
    (patches, _), (seen, _) = passes[0], passes[-1]
    rows = jnp.zeros((len(text_len), len(passes)), jnp.int32)
    if seen is not patches:
      patches, rows = stack_rows(patches, seen), rows.at[:, 1].set(1)
    fused, sown = self.apply(
      ema,
      "text_given_image",
      stack_rows(*(x for _, x in passes)),
      stack_rows(*[text_len] * len(passes)),
      self.apply(ema, "project", patches),
      rows,
      dropout=key,
      mutable=[] if whole is None else ["self_attention"],
    )
    filled = attention = None
    if hidden is not None:
      filled = unstack_rows(fused, len(passes))[0]
    if whole is not None:
      layers = sown["self_attention"]["stream"]["transformer"]["layers"]
      (maps,) = layers["self_attention"]["map"]
      attention = unstack_rows(maps[-1, :, :, 0], len(passes))[-1]
    return filled, attention

  def _patch_terms(self, student, teacher, text_len, hidden, targets, alpha):
    """MIM: hidden patches, predicted by patches that attend to the caption.

    Args:
      student, teacher: parameters, patches `[B, 1 + N, D]`, embedded captions
        `[B, L, D]`, key of dropout; each.
      text_len: int32 `[B]`.
      hidden: bool `[B, N]`.
      targets: int32 `[B, N]`, or pixels `[B, N, P]`.
      alpha: the teacher's weight.
    """
    places, weights = block_mask.places(hidden, self.mask_patches)

    def predict(params, patches, context, key):
      x = self.apply(
        params, "image_given_text", patches, context, text_len, dropout=key
      )
      return self.apply(params, "patch_logits", masking.take(x[:, 1:], places))

    prediction = predict(*student)
    expected = jax.lax.stop_gradient(predict(*teacher))
    if self.visual_tokenizer is None:
      error = masked.reconstruction(
        prediction, masking.take(targets, places), "l2"
      )
      soft = masked.reconstruction(prediction, expected, "l2")
      loss = (1 - alpha) * error + alpha * soft
      return {"mim": Mean.of(loss, weights)}, {}
    codes = jnp.take_along_axis(targets, places, axis=1)
    loss, right = distillation.cross_entropy(prediction, codes, expected, alpha)
    return (
      {"mim": Mean.of(loss, weights)},
      {"mim_accuracy": Mean.of(right, weights)},
    )

  def _targets(self, batch, ctx) -> jax.Array:
    """What is to be predicted of every patch."""
    if not self.patch_weight or self.visual_tokenizer is None:
      size = self.module.vision.patch_size
      return masked.patch_targets(batch["image"], size, "normalized")
    state = ctx.method_state["visual_tokenizer"]
    return jax.lax.stop_gradient(
      self.visual_tokenizer.codes(state, batch["image"])
    )

  def _choose(self, attention, text, text_len):
    """Returns the keywords' ids int32 `[B, k]`, and whether each counts."""
    eligible = None
    if not self.keyword_specials:
      eligible = keywords.eligible(text, text_len, self.stop_ids)
    places, counted = keywords.choose(
      keywords.votes(attention, eligible), self.num_keywords
    )
    return jnp.take_along_axis(text, places, axis=1), counted & (places > 0)

  def _keyword_term(self, student, teacher, ids, counted, alpha):
    """PSL: the caption's keywords, and those that the teacher sees.

    Args:
      student, teacher: parameters, and patches `[B, 1 + N, D]`, each.
      ids, counted: of `_choose`.
      alpha: the teacher's weight.
    """
    vocab_size = self.module.stream.vocab_size
    loss = keywords.keyword_loss(
      self.apply(student[0], "keyword_logits", student[1]),
      keywords.multi_hot(ids, counted, vocab_size),
      self.apply(teacher[0], "keyword_logits", teacher[1]),
      alpha,
    )
    return Mean.of(loss)

  def keywords(self, params, batch, number: int = 5) -> dict[str, jax.Array]:
    """Shows a caption's keywords, and those that the picture adds.

    Args:
      params: parameters, taken for the teacher's.
      batch: `image`, `text`, `text_len`.
      number: of added keywords, m.

    Returns:
      `chosen`: int32 `[B, k]`, -1 where there are fewer; `added`: int32
      `[B, m]`, the likeliest that are not words of the caption, and their
      probabilities `probability` `[B, m]`.
    """
    text, text_len = shorten(batch["text"], batch["text_len"])
    patches = self.apply(params, "see", batch["image"])
    x = self.apply(params, "embed_text", text)
    _, attention = self._teach(params, None, (patches, x), text_len, None)
    ids, counted = self._choose(attention, text, text_len)
    logits = self.apply(params, "keyword_logits", patches)
    present = keywords.multi_hot(
      text, jnp.ones_like(text, bool), logits.shape[-1]
    )
    top, added = jax.lax.top_k(jnp.where(present > 0, -jnp.inf, logits), number)
    return {
      "chosen": jnp.where(counted, ids, -1),
      "added": added,
      "probability": jax.nn.sigmoid(top),
    }


def build(config) -> Simla:
  """Builds SIMLA from `config.model` and `config.method`."""
  _towers.check_pictures(config)
  options = _towers.fusion_options(config)
  for field, allowed in (
    ("mlm_axis", tuple(AXES)),
    ("keyword_feature", KEYWORD_FEATURES),
    ("keyword_image", NETWORKS),
    ("patch_text", NETWORKS),
  ):
    _towers.check(f"method.{field}", options[field], allowed)
  keyword_feature = options.pop("keyword_feature")
  vision, stream = config.model.vision, config.model.stream
  patches = (config.data.image_size // vision.patch_size) ** 2
  if vision.width != stream.width:
    raise UserError(
      "patches go through the stream as words do: config.model.vision.width="
      f"{vision.width} must equal config.model.stream.width={stream.width}"
    )
  if patches >= stream.max_len:
    raise UserError(
      f"{patches} patches and [CLS] go through the stream as if they were "
      f"words: config.model.stream.max_len={stream.max_len} must be "
      f"{patches + 1} or more"
    )
  if not 0 < options["mask_block"] <= options["mask_patches"] < patches:
    raise UserError(
      f"config.method.mask_patches={options['mask_patches']} of {patches} "
      f"patches, in blocks of at least config.method.mask_block="
      f"{options['mask_block']}: it must be 0 < block <= patches hidden < all"
    )
  tokenizer = _towers.visual_tokenizer(config, options)
  module = GroundedEncoder(
    **_towers.fusion(config, mask_token=True),
    patch_head=Projection(
      tokenizer.vocab_size if tokenizer else 3 * vision.patch_size**2
    ),
    keyword_head=Projection(config.tokenizer.vocab_size),
    keyword_feature=keyword_feature,
  )
  return Simla(module, visual_tokenizer=tokenizer, **options)
