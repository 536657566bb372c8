"""The starting values of every parameter: spread, shape, independence.

Expected deviations are open_clip's (measured on its CoCa), except for those
that it leaves out: the caption head and the text decoder start as its text
tower does, the image decoder as MAE's.
"""

import math
import re

import jax
import numpy as np
import pytest

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax import train_state
from vlp_jax.methods import base
from vlp_jax.models.initializers import BlockInit

# Widths that tell towers, fan in and fan out apart.
V, T, I, P = 64, 96, 80, 48  # noqa: E741 - vision, text, image decoder, pooler
E, PATCH, HIDDEN, DEPTH = 56, 8, 4, 3
SPEC = (
  "data.image_size=32",
  "tokenizer.vocab_size=500",
  f"model.embed_dim={E}",
  f"model.vision.width={V}",
  "model.scan=true",
  "model.vision.cls_token=true",
  "model.vision.positions=learned",
  "model.vision.stem=linear",  # the other one: test_vision.py
  "model.text.pool=cls",
  f"model.text.width={T}",
  f"model.decoder.width={T}",
  f"model.image_decoder.width={I}",
  "model.decoder.cross_mlp=true",
  "model.pooler.kind=cascade",
  "model.pooler.num_queries=64",
  f"model.pooler.width={P}",
  *(f"model.{t}.depth={DEPTH}" for t in ("vision", "text", "decoder")),
  *(
    f"model.{t}.num_heads=4"
    for t in ("vision", "text", "decoder", "image_decoder", "pooler")
  ),
)


def normal(std):
  return "normal", std


def uniform(bound):
  return "uniform", bound / 3**0.5


def xavier(fan_in, fan_out):
  return uniform((6 / (fan_in + fan_out)) ** 0.5)


def _expected():
  """The start of each parameter: regular expression -> kind, deviation."""
  block = "transformer/layers/"
  rules = {
    r"(norm|\w+_norm)/scale": ("constant", 1),
    r"(norm|\w+_norm)/bias": ("constant", 0),
    r"(qkv|q|k|v|kv|out|proj|visible|pixels)/bias": ("constant", 0),
    "temperature/logit_scale": ("constant", math.log(1 / 0.07)),
    "text/embedding/embedding": normal(0.02),
    "text/(pos|cls|cls_pos)": normal(0.01),
    "text_projection/projection/kernel": normal(T**-0.5),
    "vision/(pos|cls|cls_pos)": normal(V**-0.5),
    "vision/patch/kernel": uniform((3 * PATCH**2) ** -0.5),
    "image_pool/projection/kernel": normal(P**-0.5),
    r"image_pool/\w+/query": normal(1.0),
    r"image_pool/\w+/q/kernel": xavier(P, P),
    "image_pool/generative/[kv]/kernel": xavier(V, P),
    "image_pool/contrastive/[kv]/kernel": xavier(P, P),
    r"image_pool/\w+/out/kernel": uniform(P**-0.5),
    f"decoder/{block}cross_attention/kv/kernel": normal(P**-0.5),
    "vocabulary/kernel": normal(T**-0.5),
    "decoder_input/mask_token": normal(0.02),
    "decoder_input/visible/kernel": xavier(V, I),
    "pixels/pixels/kernel": xavier(I, 3 * PATCH**2),
    # PyTorch's defaults: query, key and value are one matrix to it.
    f"vision/{block}self_attention/qkv/kernel": xavier(V, 3 * V),
    f"vision/{block}self_attention/out/proj/kernel": uniform(V**-0.5),
    # MAE's.
    f"image_decoder/{block}self_attention/qkv/kernel": xavier(I, I),
    f"image_decoder/{block}cross_attention/q/kernel": xavier(I, I),
    f"image_decoder/{block}cross_attention/kv/kernel": xavier(T, I),
    rf"image_decoder/{block}\w+/out/proj/kernel": xavier(I, I),
    f"image_decoder/{block}mlp/(up|down)/kernel": xavier(I, HIDDEN * I),
    f"image_decoder/{block}mlp/(up|down)/bias": ("constant", 0),
  }
  # CLIP's: two residual branches a layer; four in the decoder with two MLPs.
  for tower, branches in (("text", 2 * DEPTH), ("decoder", 4 * DEPTH)):
    write = normal((T * branches) ** -0.5)
    rules |= {
      rf"{tower}/{block}\w+_attention/(qkv|q)/kernel": normal(T**-0.5),
      rf"{tower}/{block}\w+_attention/out/proj/kernel": write,
      rf"{tower}/{block}(mlp|self_mlp)/up/kernel": normal((2 * T) ** -0.5),
      rf"{tower}/{block}(mlp|self_mlp)/down/kernel": write,
    }
  for tower, width in (("text", T), ("decoder", T), ("vision", V)):
    for name, fan_in in (("up", width), ("down", HIDDEN * width)):
      bias = rf"{tower}/{block}(mlp|self_mlp)/{name}/bias"
      rules[bias] = uniform(fan_in**-0.5)
      if tower == "vision":
        rules[f"{tower}/{block}mlp/{name}/kernel"] = uniform(fan_in**-0.5)
  return rules


@pytest.fixture(scope="module")
def params():
  config = config_lib.load("configs/sycoca.py", SPEC)
  method = base.get("sycoca", config)
  spec = train_state.batch_spec(config)
  make = toys.jit(lambda key: method.init(key, _zeros(spec))[0])
  leaves = jax.tree_util.tree_leaves_with_path(make(jax.random.key(0)))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def _zeros(spec):
  return {k: np.zeros(v.shape, v.dtype) for k, v in spec.items()}


def test_every_parameter(params):
  rules, used = _expected(), set()
  for name, value in params.items():
    found = [
      pattern
      for pattern in rules
      if re.fullmatch(pattern, name)
      or (not pattern[0].isalpha() and re.search(f"/{pattern}$", name))
    ]
    assert len(found) == 1, (name, found)
    used.update(found)
    kind, expected = rules[found[0]]
    if kind == "constant":
      np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
      continue
    n, std = value.size, value.std()
    # Five standard errors of a sample's mean and deviation.
    assert abs(value.mean()) < 5 * expected / n**0.5, name
    assert abs(std - expected) < 5 * expected / (2 * n) ** 0.5, (
      name,
      std,
      expected,
    )
    # A uniform distribution ends at sqrt(3) deviations, a normal one does not.
    largest = np.abs(value).max() / (3**0.5 * expected)
    if kind == "uniform":
      assert largest <= 1 + 1e-6, name
    elif n > 500:
      assert largest > 1.2, name
  assert used == set(rules), set(rules) - used


def test_layers_and_parts_start_apart(params):
  for name, value in params.items():
    if "/layers/" not in name or not value.std():
      continue
    layers = value.reshape(len(value), -1)
    assert len(np.unique(layers[:, 0])) == len(layers), name
    if re.search("qkv/kernel|kv/kernel", name):
      parts = np.moveaxis(value[0], 1, 0).reshape(value.shape[2], -1)
      assert np.abs(np.corrcoef(parts) - np.eye(len(parts))).max() < 0.1, name


def test_unknown_schemes_are_refused():
  with pytest.raises(ValueError, match="'he' is none of"):
    BlockInit("he", 8, 2)
