"""CLIP and SigLIP against NumPy."""

import numpy as np
import pytest

from tests import toys
from vlp_jax.errors import UserError

SIGMOID = ("method.loss=sigmoid",)


def _run(*overrides, params=None, batch=None):
  params = params or toys.params("clip", *overrides)
  batch = batch or toys.batch(6)
  losses = toys.losses("clip", *overrides)
  total, (terms, report) = losses(params, batch, toys.context())
  image = toys.module_call("clip", overrides, "encode_image")
  text = toys.module_call("clip", overrides, "encode_text")
  embeddings = (
    np.asarray(image(params, batch["image"]), np.float64),
    np.asarray(text(params, batch["text"], batch["text_len"]), np.float64),
  )
  return total, terms, report, embeddings


@pytest.mark.parametrize("reduction, factor", [("mean", 0.5), ("sum", 1.0)])
def test_softmax(reduction, factor):
  total, terms, report, (image, text) = _run(
    f"method.itc_reduction={reduction}"
  )
  logits = 5 * image @ text.T
  logits[4, 5] = logits[5, 4] = -np.inf  # two captions of one picture
  right = np.diagonal(logits)
  i2t = np.log(np.exp(logits).sum(1)) - right
  t2i = np.log(np.exp(logits).sum(0)) - right
  expected = factor * (i2t + t2i).mean()
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert terms.keys() == {"itc"}
  np.testing.assert_allclose(report["logit_scale"], 5, rtol=1e-5)
  np.testing.assert_allclose(
    report["i2t_accuracy"], (logits.argmax(1) == np.arange(6)).mean()
  )
  np.testing.assert_allclose(
    report["t2i_accuracy"], (logits.argmax(0) == np.arange(6)).mean()
  )


def test_sigmoid():
  total, terms, report, (image, text) = _run(*SIGMOID)
  bias = toys.params("clip", *SIGMOID)["temperature"]["logit_bias"]
  logits = 5 * image @ text.T + bias
  signs = 2 * np.eye(6) - 1
  loss = np.log1p(np.exp(-signs * logits))
  loss[4, 5] = loss[5, 4] = 0
  np.testing.assert_allclose(total, loss.sum() / 6, rtol=1e-5)
  np.testing.assert_allclose(report["logit_bias"], bias, rtol=1e-5)
  assert terms.keys() == {"itc"}


def test_siglip_starts_at_its_own_temperature():
  module = toys.method("clip", *SIGMOID).module
  assert (module.temperature.start, module.temperature.bias) == (10.0, -10.0)
  module = toys.method("clip").module
  assert (module.temperature.start, module.temperature.bias) == (1 / 0.07, None)


def test_the_order_of_the_batch_does_not_matter():
  params, batch = toys.params("clip"), toys.batch(6)
  order = np.array([3, 0, 5, 1, 4, 2])
  moved = {name: value[order] for name, value in batch.items()}
  total, _, _, embeddings = _run(params=params, batch=batch)
  total_2, _, _, embeddings_2 = _run(params=params, batch=moved)
  np.testing.assert_allclose(total_2, total, rtol=1e-6)
  for before, after in zip(embeddings, embeddings_2, strict=True):
    np.testing.assert_allclose(after, before[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "override, says",
  [
    (
      "method.loss=hinge",
      "method.loss is 'hinge', not one of softmax, sigmoid",
    ),
    (
      "method.itc_reduction=max",
      "itc_reduction is 'max', not one of mean, sum",
    ),
    ("model.pooler.kind=mean", "pooler.kind is 'mean', not one of cls, "),
    (
      "model.pooler.kind=cls",
      r"reads \[CLS\]: set config.model.vision.cls_tok",
    ),
    ("model.pooler.kind=cascade", "needs config.model.pooler.num_queries >= 1"),
    ("model.text.pool=last", "text.pool is 'last', not one of cls, eot"),
    ("model.vision.positions=rope", "'rope', not one of learned, sincos"),
    ("model.vision.patch_size=12", "hmlp needs .* 4, 8, 16 or 32, not 12"),
    ("model.vision.width=18", "sincos positions need .* % 4 == 0"),
    ("model.vision.num_heads=5", "5 heads do not divide a width of 16"),
    ("model.activation=swish", "'swish', not one of gelu, quick_gelu, relu2"),
    ("model.remat=all", "remat is 'all', not one of none, full, dots"),
    ("model.dtype=int8", "dtype is 'int8', not one of auto, float32, bfloat16"),
  ],
)
def test_what_cannot_be_built(override, says):
  with pytest.raises(UserError, match=says) as error:
    toys.method("clip", override)
  assert "\n" not in str(error.value)


def test_open_clips_pooler_needs_two_queries():
  overrides = (*toys.CLS, "model.pooler.kind=openclip")
  with pytest.raises(UserError, match="num_queries >= 2"):
    toys.method("clip", *overrides, "model.pooler.num_queries=1")
  toys.method("clip", *overrides, "model.pooler.num_queries=2")
