"""SyCoCa: CoCa, and a picture that is rebuilt from its caption.

Ma et al. 2024, "SyCoCa: Symmetrizing contrastive captioners with attentive
masking for multimodal alignment", ICML 2024, arXiv 2401.02137. CoCa lets the
picture explain the caption (captioning). SyCoCa adds the other direction, and
a ranking of patches by the caption decides what either direction sees:
captioning keeps the patches that the caption is about, and text-guided
masked image modelling (TG-MIM) hides just those and rebuilds them.

Map from the paper to code:
  section 3.2, L_ITC and L_IC        `coca.contrastive_terms`, `caption_terms`
  section 3.3, L_TG-MIM              `SyCoCa._reconstruct`
  section 3.4, attentive masking     `SyCoCa._rank`
  section 4.1, 1 : 2 : 1             `term_weights`

The paper builds on open_clip's CoCa and leaves some things open. What was
chosen here, each a field: scores are inner products in the joint space of
what a patch adds to the picture's embedding (without an additive pooler: of
its own unit embedding) with all of the caption's tokens but the start symbol;
TG-MIM hides patches before a
second, short encoder pass (`mask_stage="input"`), or masks the output of the
only pass (`tokens`, cheaper, but visible tokens have seen the hidden ones);
targets are normalised pixels, the distance is squared, the decoder reads the
unimodal text tokens (which have not seen the picture).
"""

import dataclasses

import jax
import jax.numpy as jnp

from vlp_jax.errors import UserError
from vlp_jax.losses import contrastive, masked
from vlp_jax.methods import _towers
from vlp_jax.methods.base import (
  CaptionerMethod,
  Context,
  Coupled,
  Mean,
  Output,
)
from vlp_jax.methods.coca import caption_terms, contrastive_terms
from vlp_jax.models.captioner import Captioner
from vlp_jax.models.heads import PatchDecoderInput, PixelHead
from vlp_jax.models.stream import Stream
from vlp_jax.ops import masking, masks
from vlp_jax.ops import patches as patches_lib

SCORES = ("joint", "raw", "random", "reverse")
MASK_STAGES = ("input", "tokens")
DECODERS = ("separate", "shared")


class SyCoCaModule(Captioner):
  """A captioner with an image decoder.

  Attributes:
    image_decoder: the stack that rebuilds pictures; None lends the text
      decoder's weights.
    decoder_input: tokens of the masked picture.
    pixels: from the decoder's output to pixels.
  """

  decoder_input: PatchDecoderInput
  pixels: PixelHead
  image_decoder: Stream | None = None

  def draw(
    self,
    visible: jax.Array,
    order: jax.Array,
    tokens: jax.Array | None,
    text_len: jax.Array,
  ) -> jax.Array:
    """Predicts the hidden patches.

    Args:
      visible: encoded visible patches `[B, N - K, D]`.
      order: int32 `[B, N]`, all patches, the K hidden ones first.
      tokens: the caption's tokens `[B, L, D]`; None rebuilds without text.
      text_len: int32 `[B]`.

    Returns:
      float32 `[B, K, patch pixels]`, in the order of `order`.
    """
    # The decoder does not care in which order patches come, only where their
    # positions say they are: visible ones first saves putting them back.
    side = round(order.shape[1] ** 0.5)
    width = self.decoder_input.width
    table = jnp.asarray(patches_lib.sincos((side, side), width))
    hidden = order.shape[1] - visible.shape[1]
    x = self.decoder_input(
      visible, table[order[:, hidden:]], table[order[:, :hidden]]
    )
    decoder = self.image_decoder or self.decoder
    x = decoder(x, tokens, context_len=text_len)
    return self.pixels(x[:, visible.shape[1] :])

  def __call__(self, image, text, text_len) -> None:
    """Touches every parameter, for `init`."""
    super().__call__(image, text, text_len)
    _, patches = self.see(self.embed_patches(image))
    _, tokens = self.read(text, text_len)
    n = patches.shape[1]
    order = jnp.broadcast_to(jnp.arange(n), (len(text), n))
    self.draw(patches[:, n // 2 :], order, tokens, text_len)


@dataclasses.dataclass(frozen=True)
class SyCoCa(CaptionerMethod):
  """See the module's docstring.

  Attributes:
    itc_weight: of L_ITC.
    caption_weight: lambda_IC, of L_IC.
    tgmim_weight: lambda_TM, of L_TG-MIM; at 0 it is not computed.
    itc_reduction: `mean` or `sum` of the two directions.
    itc_chunk: rows of logits that a device holds at a time; 0 is all.
    caption_chunk: positions whose logits exist at a time; 0 is all.
    score: what ranks the patches: `joint` (see above; `Captioner.patch_parts`),
      `raw` (product of the towers' outputs), `random`, or `reverse` of
      `joint`.
    r_h: share of patches, the highest in rank, that TG-MIM hides.
    r_l: share of patches, the lowest in rank, that captioning does not see.
    mask_stage: whether TG-MIM hides patches at the `input` of a second pass
      of the encoder, or masks its output `tokens`.
    text_guided: whether the image decoder reads the caption.
    target: `normalized` or `pixels`.
    distance: `l2` or `l1`.
    attentive_start_step: until then the ranking is random.
  """

  itc_weight: float = 1.0
  caption_weight: float = 2.0
  tgmim_weight: float = 1.0
  itc_reduction: str = "mean"
  itc_chunk: int = 0
  caption_chunk: int = 0
  score: str = "joint"
  r_h: float = 0.5
  r_l: float = 0.5
  mask_stage: str = "input"
  text_guided: bool = True
  target: str = "normalized"
  distance: str = "l2"
  attentive_start_step: int = 0

  def forward(self, params, batch, ctx) -> Output:
    embedded = self.apply(params, "embed_patches", batch["image"])
    cls, patches = self.apply(params, "see", embedded)
    image, context = self.apply(params, "pool", cls, patches)
    text, tokens = self.apply(params, "read", batch["text"], batch["text_len"])

    # One ranking serves both directions.
    order = self._rank(params, batch, patches, context, tokens, ctx)
    num_dropped = masking.count(self.r_l, patches.shape[1])
    if num_dropped:
      kept = masking.take(patches, order[:, : patches.shape[1] - num_dropped])
      _, context = self.apply(params, "pool", cls, kept)
    terms, report = caption_terms(self, params, batch, tokens, context)
    if self.tgmim_weight:
      prediction, target = self._reconstruct(
        params, batch, embedded, patches, tokens, order
      )
      error = masked.reconstruction(prediction, target, self.distance)
      terms["tgmim"] = Mean.of(error)
    return Output(dict(image=image, text=text), terms, report)

  def couple(self, params, shared, batch, ctx) -> Coupled:
    return contrastive_terms(self, params, shared, batch, ctx)

  def term_weights(self, step: jax.Array) -> dict[str, float]:
    weights = {"itc": self.itc_weight, "caption": self.caption_weight}
    if self.tgmim_weight:
      weights["tgmim"] = self.tgmim_weight
    return weights

  def _rank(self, params, batch, patches, context, tokens, ctx) -> jax.Array:
    """Orders patches by the caption, the most relevant first: `[B, N]`."""
    noise = masking.random_scores(
      ctx.rngs["patch_mask"], batch["index"], patches.shape[1]
    )
    if self.score == "random":
      return masking.rank(noise)
    if self.score == "raw":
      scores = relevance(context, tokens, batch["text_len"])
    else:
      scores = relevance(
        self.apply(params, "patch_parts", patches),
        self.apply(params, "token_embeddings", tokens),
        batch["text_len"],
      )
    if self.score == "reverse":
      scores = -scores
    if self.attentive_start_step:
      scores = jnp.where(ctx.step < self.attentive_start_step, noise, scores)
    return masking.rank(scores)

  def _reconstruct(self, params, batch, embedded, patches, tokens, order):
    """TG-MIM: returns predictions and targets of the hidden patches."""
    hidden = masking.count(self.r_h, order.shape[1])
    source = embedded if self.mask_stage == "input" else patches
    visible = masking.take(source, order[:, hidden:])
    if self.mask_stage == "input":
      _, visible = self.apply(params, "see", visible)
    prediction = self.apply(
      params,
      "draw",
      visible,
      order,
      tokens if self.text_guided else None,
      batch["text_len"],
    )
    target = masked.patch_targets(
      batch["image"], self.module.vision.patch_size, self.target
    )
    return prediction, masking.take(target, order[:, :hidden])

  def reconstruct(self, params, batch, key) -> dict[str, jax.Array]:
    """Rebuilds pictures from their visible patches and their captions.

    Args:
      params: parameters.
      batch: `image`, `text`, `text_len`.
      key: for the mask, where that is random.

    Returns:
      `masked` and `prediction`: uint8 `[B, H, W, 3]`, the picture with its
      hidden patches grey, and rebuilt (a normalised target is shown with the
      true patch's mean and deviation); `mask`: bool `[B, N]`, True = hidden.
    """
    index = jnp.arange(len(batch["text_len"]), dtype=jnp.int32)
    batch = {**batch, "index": index}
    ctx = Context(
      step=jnp.int32(self.attentive_start_step),
      rngs={"patch_mask": key},
      ema_params=None,
      method_state={},
      train=False,
    )
    embedded = self.apply(params, "embed_patches", batch["image"])
    cls, patches = self.apply(params, "see", embedded)
    _, context = self.apply(params, "pool", cls, patches)
    _, tokens = self.apply(params, "read", batch["text"], batch["text_len"])
    order = self._rank(params, batch, patches, context, tokens, ctx)
    prediction, _ = self._reconstruct(
      params, batch, embedded, patches, tokens, order
    )
    size = self.module.vision.patch_size
    pixels = patches_lib.patch_pixels(batch["image"], size)
    index = order[:, : prediction.shape[1]]
    if self.target == "normalized":
      true = masking.take(pixels, index)
      mean = jnp.mean(true, axis=-1, keepdims=True)
      std = jnp.sqrt(jnp.var(true, axis=-1, keepdims=True, ddof=1) + 1e-6)
      prediction = prediction * std + mean
    rows = jnp.arange(len(index))[:, None]

    def fill(value):
      filled = patches_lib.unpatchify(pixels.at[rows, index].set(value), size)
      return patches_lib.denormalize(filled)

    return {
      "masked": fill(0.0),
      "prediction": fill(prediction),
      "mask": masking.scatter_mask(index, order.shape[1]),
    }


def relevance(
  patches: jax.Array, tokens: jax.Array, text_len: jax.Array
) -> jax.Array:
  """Scores each patch by the caption's token that it is most like.

  Padding does not count, nor does the start symbol: in a causal tower its
  output is the same for every caption.

  Args:
    patches: `[B, N, E]`.
    tokens: `[B, L, E]`.
    text_len: int32 `[B]`.

  Returns:
    float32 `[B, N]`, without gradient.
  """
  similarity = contrastive.similarity(
    jax.lax.stop_gradient(patches), jax.lax.stop_gradient(tokens)
  )
  counts = masks.valid(text_len, tokens.shape[1])
  counts &= jnp.arange(tokens.shape[1]) > 0
  return jnp.max(similarity, axis=-1, where=counts[:, None], initial=-jnp.inf)


def build(config) -> SyCoCa:
  """Builds SyCoCa from `config.model` and `config.method`."""
  _towers.check_pictures(config)
  options = {k: v for k, v in config.method.items() if k != "name"}
  for field, allowed in (
    ("score", SCORES),
    ("mask_stage", MASK_STAGES),
    ("target", masked.TARGETS),
    ("distance", tuple(masked.DISTANCES)),
    ("itc_reduction", contrastive.REDUCTIONS),
    ("decoders", DECODERS),
  ):
    _towers.check(f"method.{field}", options[field], allowed)
  patches = (config.data.image_size // config.model.vision.patch_size) ** 2
  if options["tgmim_weight"] and not (
    0 < masking.count(options["r_h"], patches) < patches
  ):
    raise UserError(
      f"config.method.r_h={options['r_h']} hides all or none of the "
      f"{patches} patches; choose a share between 0 and 1"
    )
  if not 0 <= masking.count(options["r_l"], patches) < patches:
    raise UserError(
      f"config.method.r_l={options['r_l']} leaves captioning none of the "
      f"{patches} patches; choose a share from 0 to below 1"
    )
  model = config.model
  if options["score"] == "raw" and (
    model.pooler.kind not in ("cls", "attention")
    or model.vision.width != model.text.width
  ):
    raise UserError(
      "config.method.score=raw compares the towers' outputs: it needs "
      "config.model.pooler.kind=cls or attention, and towers of equal width"
    )
  shared = options.pop("decoders") == "shared"
  tower = "decoder" if shared else "image_decoder"
  width = model[tower].width
  if width % 4:
    raise UserError(
      f"config.model.{tower}.width={width} must be a multiple of 4: the image "
      "decoder's positions are sines and cosines"
    )
  image_decoder = None
  if not shared:
    image_decoder = _towers.stream(config, model.image_decoder, scheme="xavier")
  module = SyCoCaModule(
    **_towers.captioner(config),
    decoder_input=PatchDecoderInput(width, _towers.dtype(config)),
    pixels=PixelHead(model.vision.patch_size),
    image_decoder=image_decoder,
  )
  return SyCoCa(module, **options)
