"""CoCa: one contrastive and one captioning loss from one pass.

Yu et al. 2022, "CoCa: Contrastive captioners are image-text foundation
models", arXiv 2205.01917.

Map from equations to code:
  equation 2, L_Con   `couple`
  equation 3, L_Cap   `forward`
  equation 4, total   `term_weights`

Differences, each a field: `itc_reduction` is the mean of both directions, as
in open_clip, where the paper writes their sum; captioning is averaged over
tokens, where the paper sums. The [CLS] of the text attends to the caption's
tokens and itself (open_clip's mask is off by one, `text.legacy_cls_mask`),
and the vocabulary head is initialised (open_clip's is not).
"""

import dataclasses

import jax

from vlp_jax.losses import captioning, contrastive
from vlp_jax.methods import _towers
from vlp_jax.methods.base import CaptionerMethod, Coupled, Mean, Output
from vlp_jax.models.captioner import Captioner
from vlp_jax.ops.rows import Rows


@dataclasses.dataclass(frozen=True)
class CoCa(CaptionerMethod):
  """See the module's docstring.

  Attributes:
    itc_weight: lambda_Con.
    caption_weight: lambda_Cap.
    itc_reduction: `mean` or `sum` of the two directions.
    itc_chunk: rows of logits that a device holds at a time; 0 is all.
    caption_chunk: positions whose logits exist at a time; 0 is all.
  """

  itc_weight: float = 1.0
  caption_weight: float = 2.0
  itc_reduction: str = "mean"
  itc_chunk: int = 0
  caption_chunk: int = 0

  def forward(self, params, batch, ctx) -> Output:
    cls, patches = self.apply(
      params, "see", self.apply(params, "embed_patches", batch["image"])
    )
    image, context = self.apply(params, "pool", cls, patches)
    text, tokens = self.apply(params, "read", batch["text"], batch["text_len"])
    terms, report = caption_terms(self, params, batch, tokens, context)
    return Output(dict(image=image, text=text), terms, report)

  def couple(self, params, shared, batch, ctx) -> Coupled:
    return contrastive_terms(self, params, shared, batch, ctx)

  def term_weights(self, step: jax.Array) -> dict[str, float]:
    return {"itc": self.itc_weight, "caption": self.caption_weight}


def caption_terms(method, params, batch, tokens, context):
  """L_Cap of a chunk: predicts each token from those before and the picture.

  Args:
    method: has `apply` and `caption_chunk`.
    params: parameters.
    batch: `text` and `text_len`.
    tokens: the text tower's output `[B, L, D]`.
    context: what the decoder may see of the picture, `[B, S, D]`.

  Returns:
    The terms and the report of `forward`.
  """
  hidden = method.apply(params, "write", tokens[:, :-1], context)
  labels, weights = captioning.targets(batch["text"], batch["text_len"])
  nll, right = captioning.cross_entropy(
    lambda x: method.apply(params, "logits", x),
    hidden,
    labels,
    method.caption_chunk,
  )
  return (
    {"caption": Mean.of(nll, weights)},
    {"token_accuracy": Mean.of(right, weights)},
  )


def contrastive_terms(method, params, shared, batch, ctx) -> Coupled:
  """L_Con of the whole batch, from `image` and `text` in `shared`."""
  scale, _ = method.apply(params, "logit_scale")
  loss, right = contrastive.softmax(
    shared["image"],
    shared["text"],
    scale,
    batch["image_id"],
    method.itc_reduction,
    Rows(method.itc_chunk, ctx.sharding),
  )
  report = {f"{name}_accuracy": Mean.of(v) for name, v in right.items()}
  report["logit_scale"] = Mean.of(scale[None])
  return Coupled({"itc": Mean.of(loss)}, report, {})


def build(config) -> CoCa:
  """Builds CoCa from `config.model` and `config.method`."""
  fields = {k: v for k, v in config.method.items() if k != "name"}
  _towers.check(
    "method.itc_reduction", fields["itc_reduction"], contrastive.REDUCTIONS
  )
  return CoCa(Captioner(**_towers.captioner(config)), **fields)
