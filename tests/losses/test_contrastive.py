"""Contrastive losses against NumPy, with pictures that have two captions."""

import jax
import numpy as np
import pytest

from vlp_jax.losses import contrastive
from vlp_jax.ops.rows import Rows

pytestmark = pytest.mark.usefixtures("strict_ranks")

# Rows 0 and 2 are of one picture, rows 3 and 5 of another.
IDS = np.array([7, 1, 7, 4, 0, 4], np.int32)


def _embeddings(seed=0):
  x = np.random.default_rng(seed).normal(size=(2, len(IDS), 5))
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  return x.astype(np.float32)


def _softmax(image, text, scale, ids):
  """Two cross-entropies over rows, by loops; (i2t, t2i)."""
  losses = []
  for a, b in ((image, text), (text, image)):
    rows = []
    for i in range(len(ids)):
      others = [j for j in range(len(ids)) if ids[j] != ids[i]]
      logits = [scale * a[i] @ b[j] for j in [i, *others]]
      rows.append(np.log(np.sum(np.exp(logits))) - logits[0])
    losses.append(np.array(rows))
  return losses


def _sigmoid(image, text, scale, bias, ids):
  losses = np.zeros(len(ids))
  for i, j in np.ndindex(len(ids), len(ids)):
    logit = scale * image[i] @ text[j] + bias
    if i == j:
      losses[i] += np.log1p(np.exp(-logit))
    elif ids[i] != ids[j]:
      losses[i] += np.log1p(np.exp(logit))
  return losses


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("reduction, factor", [("mean", 0.5), ("sum", 1.0)])
def test_softmax(reduction, factor, chunk):
  image, text = _embeddings()
  loss, _ = contrastive.softmax(image, text, 8.0, IDS, reduction, Rows(chunk))
  expected = factor * sum(_softmax(image, text, 8.0, IDS))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_softmax_accuracy():
  image, text = _embeddings(1)
  text = image + 3 * text  # some are right, and some are not
  _, right = contrastive.softmax(image, text, 8.0, IDS)
  logits = image @ text.T
  logits[(IDS[:, None] == IDS) & ~np.eye(len(IDS), dtype=bool)] = -9
  rows = np.arange(len(IDS))
  np.testing.assert_array_equal(right["i2t"], logits.argmax(1) == rows)
  np.testing.assert_array_equal(right["t2i"], logits.argmax(0) == rows)
  assert 0 < np.sum(right["i2t"]) < len(IDS)


def test_softmax_refuses_other_reductions():
  image, text = _embeddings()
  with pytest.raises(ValueError, match="neither mean nor sum"):
    contrastive.softmax(image, text, 8.0, IDS, "max")


@pytest.mark.parametrize("chunk", [0, 2])
def test_sigmoid(chunk):
  image, text = _embeddings()
  loss = contrastive.sigmoid(image, text, 8.0, -3.0, IDS, Rows(chunk))
  expected = _sigmoid(image, text, 8.0, -3.0, IDS)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_captions_of_the_same_picture_do_not_repel(kind):
  """The gradient of picture 0's loss is zero on its other caption."""
  image, text = _embeddings()

  def loss(text):
    if kind == "softmax":
      return contrastive.softmax(image, text, 8.0, IDS)[0][0]
    return contrastive.sigmoid(image, text, 8.0, -3.0, IDS)[0]

  size = np.abs(jax.grad(loss)(text)).max(axis=1)
  assert size[2] == 0
  assert (size[[0, 1, 3, 4, 5]] > 1e-4).all()


def test_large_scales_stay_finite():
  image, text = _embeddings()
  value, gradient = jax.value_and_grad(
    lambda x: contrastive.softmax(x, text, 100.0, IDS)[0].sum()
  )(image)
  expected = 0.5 * np.sum(_softmax(image, text, 100.0, IDS))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert np.isfinite(gradient).all()
