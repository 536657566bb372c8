"""CLIP: learn two towers by telling matching pairs from the others.

Radford et al. 2021, "Learning transferable visual models from natural
language supervision", arXiv 2103.00020; with `loss="sigmoid"` Zhai et al.
2023, "Sigmoid loss for language image pre-training", arXiv 2303.15343.

Map: CLIP figure 3 and SigLIP algorithm 1 are `couple`.

Differences: captions of the same picture are not counted as negatives. The
text tower is causal in both cases (SigLIP's is not).
"""

import dataclasses

import jax

from vlp_jax.losses import contrastive
from vlp_jax.methods import _towers
from vlp_jax.methods.base import Coupled, DualEncoderMethod, Mean, Output
from vlp_jax.models.captioner import DualEncoder
from vlp_jax.ops.rows import Rows


@dataclasses.dataclass(frozen=True)
class CLIP(DualEncoderMethod):
  """See the module's docstring.

  Attributes:
    loss: `softmax` (CLIP) or `sigmoid` (SigLIP).
    itc_reduction: of `softmax`: `mean` or `sum` of the two directions.
    itc_chunk: rows of logits that a device holds at a time; 0 is all.
  """

  loss: str = "softmax"
  itc_reduction: str = "mean"
  itc_chunk: int = 0

  def forward(self, params, batch, ctx) -> Output:
    image = self.encode_image(params, batch)
    text = self.encode_text(params, batch)
    return Output(dict(image=image, text=text), {}, {})

  def couple(self, params, shared, batch, ctx) -> Coupled:
    scale, bias = self.apply(params, "logit_scale")
    image, text, image_id = shared["image"], shared["text"], batch["image_id"]
    report = {"logit_scale": Mean.of(scale[None])}
    rows = Rows(self.itc_chunk, ctx.sharding)
    if self.loss == "sigmoid":
      loss = contrastive.sigmoid(image, text, scale, bias, image_id, rows)
      report["logit_bias"] = Mean.of(bias[None])
    else:
      loss, right = contrastive.softmax(
        image, text, scale, image_id, self.itc_reduction, rows
      )
      report |= {f"{name}_accuracy": Mean.of(v) for name, v in right.items()}
    return Coupled({"itc": Mean.of(loss)}, report, {})

  def term_weights(self, step: jax.Array) -> dict[str, float]:
    return {"itc": 1.0}


def build(config) -> CLIP:
  """Builds CLIP from `config.model` and `config.method`."""
  _towers.check("method.loss", config.method.loss, ("softmax", "sigmoid"))
  _towers.check(
    "method.itc_reduction",
    config.method.itc_reduction,
    contrastive.REDUCTIONS,
  )
  start = {}
  if config.method.loss == "sigmoid":
    start = dict(scale=10.0, bias=-10.0)  # SigLIP section 3.2
  fields = {k: v for k, v in config.method.items() if k != "name"}
  return CLIP(DualEncoder(**_towers.dual_encoder(config, **start)), **fields)
