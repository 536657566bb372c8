"""SCL: semantic completion, of pictures and of videos.

Ji et al. 2023, "Seeing what you miss: vision-language pre-training with
semantic completion learning", CVPR 2023, arXiv 2211.13437; the local terms are
those of its follow-up GLSCL (Tu et al. 2023, arXiv 2306.07096). One side of a
pair is partly hidden. What the fusion encoder makes of it, given the other
side, has to be what it makes of the complete one: so a global feature is
recovered from a part and from the other modality.

Map from the paper to code (the names are the release's):
  CL      contrast of the towers                        `couple`
  ITM     matching of pictures and texts                `_match_terms`
  MLM     hidden words                                  `_word_terms`
  MVSC    completion of a picture, from 20 % of it      `couple`
  MLSC    completion of a text, from 60 % of it         `couple`
  MLTC    GLSCL's completion of single tokens           `_token_term`

The release differs from what is right, in places. Each is a field;
`configs/scl.py:reference` sets these:

  field                   release      default  what it says
  contrastive_grad_scale  1 / 8        1        its gather divides gradients of
                                                contrasts by the number of GPUs
  same_image              false        true     same pictures are no negatives
  word_pool               padded       words    MLM draws from pads, too, and
                                                finds no word in some captions
  text_mask               replacement  exact    MLSC draws places repeatedly and
                                                hides fewer than it should
  keep_temperature        false        true     within 0.01 and 0.5
  match_group             16           all      examples that share negatives
  optimizer.decay_also    tokens,      (none)   what decays beside matrices
                          temperature

Not reproduced: of 4,096 pairs 128 are contrasted at a time; its CLIP's layer
norms decay; of videos, features are normalised over frames, not channels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.errors import UserError
from vlp_jax.losses import captioning, completion, contrastive, matching
from vlp_jax.methods import _towers
from vlp_jax.methods._matcher import stack_rows, unstack_rows
from vlp_jax.methods._pairs import PairMethod
from vlp_jax.methods.base import Coupled, Mean, Output
from vlp_jax.models.captioner import unit
from vlp_jax.models.transformer import take_rows
from vlp_jax.models.two_stream import SCLEncoder, Seen
from vlp_jax.ops import masking, masks, rng, token_mask
from vlp_jax.ops.rows import Rows
from vlp_jax.ops.token_mask import HiddenWords

TEMPERATURE = (0.01, 0.5)  # where it is kept
NEGATIVES = ("random", "hard")
WORD_POOLS = ("words", "padded")
TEXT_MASKS = ("exact", "replacement")


class Draws(NamedTuple):
  """What chance decides in a step.

  Attributes:
    words: MLM's captions, and the words that they hide.
    part: MLSC's, with every hidden word as [MASK].
    keep: int32 `[B, K]`, the patches that MVSC does not drop.
    patches: int32 `[B, M]`, the patches that MLTC hides.
    noise: Gumbel `[B, g]`, of matching's negatives.
    lot: float32 `[B]`; the lower half of a group keeps its own pictures.
  """

  words: HiddenWords
  part: HiddenWords
  keep: jax.Array
  patches: jax.Array
  noise: jax.Array
  lot: jax.Array


@dataclasses.dataclass(frozen=True)
class Scl(PairMethod):
  """See the module's docstring.

  Attributes:
    match_group: examples among which matching draws its negatives, and whose
      tokens MLTC compares.
    mask_id: the id that hides a word.
    contrast_weight, match_weight, word_weight: of CL, ITM and MLM.
    vision_weight, language_weight: of MVSC and MLSC; a term is not computed
      where it is 0, as the next two.
    patch_weight, token_weight: of MLTC's patches and words.
    image_mask_ratio: share of patches that MVSC drops.
    text_mask_ratio: share of words that MLSC hides.
    patch_mask_ratio: share of patches that MLTC hides.
    word_ratio: share of words that MLM hides.
    completion_temperature: that completion's cosines are divided by.
    negatives: how ITM draws other pictures: `random`, or `hard`, by CL's
      similarities.
    contrastive_grad_scale: see above, as the next four.
    itc_chunk: rows of logits that a device holds at a time, of CL and of both
      completions; 0 is all.
    word_chunk: hidden words of a caption that have logits at a time.
    start_file: see `ModuleMethod`.
  """

  match_group: int
  mask_id: int
  contrast_weight: float = 0.5
  match_weight: float = 1.0
  word_weight: float = 1.0
  vision_weight: float = 1.0
  language_weight: float = 1.0
  patch_weight: float = 0.0
  token_weight: float = 0.0
  image_mask_ratio: float = 0.8
  text_mask_ratio: float = 0.4
  patch_mask_ratio: float = 0.3
  word_ratio: float = 0.15
  completion_temperature: float = 0.03
  negatives: str = "random"
  contrastive_grad_scale: float = 1.0
  same_image: bool = True
  word_pool: str = "words"
  text_mask: str = "exact"
  keep_temperature: bool = True
  itc_chunk: int = 0
  word_chunk: int = 0
  start_file: str = ""

  # --- The step ---------------------------------------------------------------

  def forward(self, params, batch, ctx) -> Output:
    return self.losses(params, batch, self.draw(batch, ctx), ctx)

  def losses(self, params, batch, draws: Draws, ctx) -> Output:
    """The step: all texts are encoded in one call, pictures once whole.

    Fusion runs once on all that has whole pictures, and once on pictures whose
    patches are mostly dropped, which are short.

    Args:
      params: parameters.
      batch: a chunk of the batch; pictures or clips.
      draws: what chance decided.
      ctx: of the step.
    """
    image, text_len = batch["image"], batch["text_len"]

    def key(number):
      dropout = ctx.rngs["dropout"]
      return jax.random.fold_in(dropout, number) if ctx.train else None

    sides = self.vision_weight or self.language_weight or self.token_weight
    texts = [batch["text"], draws.words.text]
    if sides or self.patch_weight:
      texts.append(draws.part.text)
    lengths = stack_rows(*[text_len] * len(texts))
    tokens = self.apply(
      params, "read", stack_rows(*texts), lengths, dropout=key(0)
    )
    text, worded, *part = unstack_rows(tokens, len(texts))
    patches = self.apply(params, "embed", image)
    seen = self.apply(params, "see", patches)
    shared = {
      "image": self.apply(params, "embed_image", seen),
      "text": self.apply(params, "embed_text", text),
    }
    shown, match = self._pair(params, seen, shared, batch, draws)
    pairs = [(text, shown), (worded, seen), *((x, seen) for x in part)]
    if self.patch_weight:
      hidden = masking.scatter_mask(draws.patches, patches.shape[-2])
      if image.ndim == 5:
        hidden = jnp.broadcast_to(hidden[:, None], patches.shape[:-1])
      covered = self.apply(params, "embed", image, hidden)
      pairs.append((text, self.apply(params, "see", covered)))
    matched, filled, *others = self._fuse(params, pairs, text_len, key(1))
    from_part, covered = (*others, None, None)[:2]
    terms, report = self._match_terms(params, matched, match)
    word, word_report = self._word_terms(params, filled[0], draws.words)
    terms, report = terms | word, report | word_report
    if sides:
      short = self.apply(params, "see", patches, draws.keep)
      (whole,) = self._fuse(params, [(text, short)], text_len, key(2))
      sides = {
        "image_part": whole[1].frames,
        "image_whole": from_part[1].frames,
        "text_part": from_part[0][:, 0],
        "text_whole": whole[0][:, 0],
      }
      shared |= {name: _direction(x) for name, x in sides.items()}
    ids = batch["image_id"]
    if self.token_weight:
      places, weights = draws.part.places, draws.part.weights
      rows = (masking.take(x[0], places) for x in (from_part, whole))
      terms["token"] = self._token_term(*rows, weights, ids)
    if self.patch_weight:
      rows = [x[1].patches_at(draws.patches) for x in (covered, from_part)]
      weights = jnp.ones(rows[0].shape[:2])
      terms["patch"] = self._token_term(*rows, weights, ids)
    return Output(shared, terms, report)

  def couple(self, params, shared, batch, ctx) -> Coupled:
    """CL, and both completions of whole sides: MVSC and MLSC."""
    ids = batch["image_id"]
    if not self.same_image:
      ids = jnp.arange(len(ids))
    temperature = self.divisor(params)
    rows = Rows(self.itc_chunk, ctx.sharding)
    loss, right = contrastive.softmax(
      shared["image"], shared["text"], 1 / temperature, ids, "sum", rows
    )
    terms = {"itc": loss}
    report = {f"{name}_accuracy": Mean.of(v) for name, v in right.items()}
    report["temperature"] = Mean.of(temperature[None])

    @jax.checkpoint
    def complete(part, whole):
      whole = jax.lax.stop_gradient(whole)
      scale = jnp.float32(1 / self.completion_temperature)
      loss, _ = contrastive.softmax(part, whole, scale, ids, "sum", rows)
      return loss, jnp.sum(part * whole, axis=-1)

    if self.vision_weight:
      frames = (
        jnp.swapaxes(shared[name], 0, 1)
        for name in ("image_part", "image_whole")
      )
      # One frame's logits at a time, in the gradient, too.
      loss, cosine = jax.lax.map(lambda pair: complete(*pair), (*frames,))
      terms["mvsc"], report["mvsc_cosine"] = jnp.mean(loss, 0), Mean.of(cosine)
    if self.language_weight:
      loss, cosine = complete(shared["text_part"], shared["text_whole"])
      terms["mlsc"], report["mlsc_cosine"] = loss, Mean.of(cosine)
    terms = {name: Mean.of(self._scaled(x)) for name, x in terms.items()}
    return Coupled(terms, report, {})

  def term_weights(self, step) -> dict[str, float]:
    del step
    weights = {
      "itc": self.contrast_weight,
      "itm": self.match_weight,
      "mlm": self.word_weight,
      "mvsc": self.vision_weight,
      "mlsc": self.language_weight,
      "patch": self.patch_weight,
      "token": self.token_weight,
    }
    always = ("itc", "itm", "mlm")
    return {k: w for k, w in weights.items() if w or k in always}

  def project(self, params):
    """Keeps the temperature within its bounds, if asked to."""
    if not self.keep_temperature:
      return params
    value = jnp.clip(params["temperature"]["value"], *TEMPERATURE)
    return {**params, "temperature": {"value": value}}

  # --- Its pieces -------------------------------------------------------------

  def divisor(self, params) -> jax.Array:
    """The temperature, within its bounds."""
    value = self.apply(params, "divisor")
    return jnp.clip(value, *TEMPERATURE) if self.keep_temperature else value

  def draw(self, batch, ctx) -> Draws:
    """Draws all masks of a step, and the negatives' noise."""
    index, text, text_len = batch["index"], batch["text"], batch["text_len"]
    length = text.shape[1]
    places = jnp.arange(length)
    words = masks.valid(text_len - 1, length) & (places > 0)
    real = jnp.sum(words, axis=1)
    key, patch_key = ctx.rngs["token_mask"], ctx.rngs["patch_mask"]
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    if self.word_pool == "padded":
      number = jnp.full(len(text), round(self.word_ratio * length))
      every = jnp.ones_like(words)
      chosen = words & token_mask.choose(keys[0], index, every, number)
    else:
      number = jnp.maximum(jnp.round(self.word_ratio * real), 1)
      chosen = token_mask.choose(keys[0], index, words, number)
    vocab_size = self.module.vocabulary.vocab_size
    hidden = token_mask.corrupt(
      keys[1],
      index,
      text,
      chosen,
      mask_id=self.mask_id,
      vocab_size=vocab_size,
    )
    most = max(1, round(self.word_ratio * length))
    if self.text_mask == "exact":
      number = jnp.maximum(jnp.round(self.text_mask_ratio * real), 1)
      parted = token_mask.choose(keys[2], index, words, number)
    else:
      number = jnp.floor(self.text_mask_ratio * real) + 1
      parted = token_mask.choose_again(keys[2], index, words, number)
    most_parted = min(length, int(self.text_mask_ratio * length) + 1)
    count = self.module.vision.num_patches(batch["image"].shape)
    scores = masking.random_scores(patch_key, index, count)
    patch_key = jax.random.fold_in(patch_key, 1)
    patches = masking.random_scores(patch_key, index, count)
    key, group = ctx.rngs["negatives"], (self.match_group,)
    noise_keys = rng.per_example(key, index)
    lot_keys = rng.per_example(jax.random.fold_in(key, 1), index)
    return Draws(
      token_mask.gather(hidden, text, chosen, most),
      token_mask.gather(
        jnp.where(parted, self.mask_id, text), text, parted, most_parted
      ),
      masking.rank(scores)[:, : int(count * (1 - self.image_mask_ratio))],
      masking.rank(patches)[:, : int(count * self.patch_mask_ratio)],
      jax.vmap(lambda key: jax.random.gumbel(key, group))(noise_keys),
      jax.vmap(jax.random.uniform)(lot_keys),
    )

  def _pair(self, params, seen, shared, batch, draws):
    """Shows half of the texts another picture of their group.

    Returns:
      The pictures; and int32 `[B]`, 1 where it is the text's own. Where no
      other is admissible, it is.
    """
    g = self.match_group
    ids = batch["image_id"].reshape(-1, g)
    admissible = matching.admissible(ids, self.same_image)
    similarity = jnp.zeros(admissible.shape)
    if self.negatives == "hard":
      image, text = (
        shared[name].reshape(*ids.shape, -1) for name in ("image", "text")
      )
      similarity = contrastive.similarity(text, image) / self.divisor(params)
    other, exists = matching.hard_negatives(
      similarity, admissible, draws.noise.reshape(admissible.shape)
    )
    first = jnp.argsort(draws.lot.reshape(ids.shape), axis=1)
    keeps = (jnp.argsort(first, axis=1) < g // 2) | (exists == 0)
    rows = jnp.where(keeps, jnp.arange(g), other)
    shown = jax.tree.map(lambda x: take_rows(x, rows), seen)
    return shown, keeps.reshape(-1).astype(jnp.int32)

  def _fuse(self, params, pairs, text_len, key):
    """Fuses several (tokens, `Seen`) of each example in one pass."""
    number = len(pairs)
    texts, pictures = zip(*pairs, strict=True)
    fused = self.apply(
      params,
      "fuse",
      stack_rows(*texts),
      stack_rows(*[text_len] * number),
      jax.tree.map(stack_rows, *pictures),
      dropout=key,
    )
    rows = jax.tree.map(lambda x: unstack_rows(x, number), fused)
    return [
      (rows[0][i], Seen(rows[1].frames[i], rows[1].patches[i]))
      for i in range(number)
    ]

  def _match_terms(self, params, fused, match):
    """ITM: the term, and its accuracy."""
    logits = self.apply(params, "match_logits", *fused)
    right = jnp.argmax(logits, axis=-1) == match
    term = Mean.of(matching.match_loss(logits, match))
    return {"itm": term}, {"itm_accuracy": Mean.of(right)}

  def _word_terms(self, params, tokens, words: HiddenWords):
    """MLM: the term, and its accuracy."""
    loss, right = captioning.cross_entropy(
      lambda x: self.apply(params, "word_logits", x),
      masking.take(tokens, words.places),
      words.labels,
      self.word_chunk,
    )
    return (
      {"mlm": Mean.of(loss, words.weights)},
      {"mlm_accuracy": Mean.of(right, words.weights)},
    )

  def _token_term(self, recovered, complete, weights, image_id):
    """MLTC, among the tokens of a group."""
    g = self.match_group
    ids = image_id.reshape(-1, g)
    if not self.same_image:
      ids = jnp.broadcast_to(jnp.arange(g), ids.shape)
    sides = (_direction(recovered), _direction(complete), weights)
    groups = [x.reshape(-1, g, *x.shape[1:]) for x in sides]
    loss = completion.tokens(*groups, ids, self.completion_temperature)
    return Mean.of(loss, weights.reshape(loss.shape))

  def _scaled(self, loss):
    """Scales a loss's gradient, and not its value."""
    scale = self.contrastive_grad_scale
    return scale * loss + (1 - scale) * jax.lax.stop_gradient(loss)


def _direction(x: jax.Array) -> jax.Array:
  return unit(x.astype(jnp.float32))


def build(config) -> Scl:
  """Builds SCL from `config.model` and `config.method`."""
  options = _towers.matching_options(config)
  for field, allowed in (
    ("negatives", NEGATIVES),
    ("word_pool", WORD_POOLS),
    ("text_mask", TEXT_MASKS),
  ):
    _towers.check(f"method.{field}", options[field], allowed)
  for name in ("image_mask_ratio", "text_mask_ratio", "patch_mask_ratio"):
    if not 0 < options[name] < 1:
      raise UserError(
        f"config.method.{name}={options[name]} is no share between 0 and 1"
      )
  module = SCLEncoder(
    **_towers.two_streams(config, mask_token=bool(options["patch_weight"]))
  )
  return Scl(module, **options)
