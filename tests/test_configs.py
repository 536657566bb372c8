"""Every config builds, at every size, without an array being made."""

import ast
import importlib
import importlib.util
import math
import re

import jax
import pytest

from vlp_jax import config as config_lib
from vlp_jax import optim, presets, train_state
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base as evaluators
from vlp_jax.methods import base

SIZES = {
  "clip": ("tiny", "debug", "b16", "l14", "g14"),
  "coca": ("tiny", "debug", "b16", "l14", "b18", "l18", "g18"),
  "sycoca": ("tiny", "debug", "b16", "l14", "g14", "b18"),
  "albef": ("tiny", "debug", "b16", "l14", "g14"),
  "simla": ("tiny", "debug", "b16", "l14", "g14", "reference"),
  "scl": ("tiny", "debug", "b16", "l14", "g14", "reference"),
}
CASES = [(name, size) for name, sizes in SIZES.items() for size in sizes]


def _state(config):
  method = base.get(config.method.name, config)
  config_lib.validate(config, 1, method.match_group)
  optimizer, _ = optim.make_optimizer(config, 100, 10)
  return jax.eval_shape(
    lambda: train_state.create(
      method, optimizer, train_state.batch_spec(config), seed=0, use_ema=True
    )
  )


def _params(spec, *overrides):
  config = config_lib.load(spec, overrides)
  method = base.get(config.method.name, config)
  return train_state.abstract_params(method, config)


def _count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_no_config_is_left_out():
  folder = config_lib.find("configs/coca.py").parent
  files = {file.stem for file in folder.glob("[!_]*.py")}
  assert files == set(SIZES)
  for name, sizes in SIZES.items():
    with pytest.raises(UserError, match=f"sizes are {', '.join(sizes)}$"):
      config_lib.load(f"configs/{name}.py:huge")


@pytest.mark.parametrize(("name", "size"), CASES)
def test_builds(name, size):
  config = config_lib.load(f"configs/{name}.py:{size}")
  state = _state(config)
  assert _count(state.params) == _count(state.ema_params) > 0
  assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", SIZES)
def test_tiny_is_the_default_and_opens_with_its_command(name):
  path = config_lib.find(f"configs/{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  commands = re.findall(
    r"--config=configs/(\w+)\.py(?::(\w+))?", module.__doc__
  )
  assert [c for c, _ in commands] == [name] * len(commands)
  assert [size or "tiny" for _, size in commands] == list(SIZES[name])
  assert module.get_config() == module.get_config("tiny")


# Parameters of every part but [poolers, text projection] of CoCa, where the
# paper's table 1 says 383M, 787M and "2.1B" (truncated: its own layers make
# 1,179 M for text and 1,011 M for vision).
PAPER = {
  "b18": (388_962_049, 383),
  "l18": (798_221_313, 787),
  "g18": (2_212_299_649, 2192),
}
# Of the other big configs.
COUNTS = {
  ("clip", "b16"): 220_852_225,
  ("coca", "b16"): 440_134_657,
  ("sycoca", "b16"): 476_667_137,
  ("sycoca", "b18"): 476_974_541,
  # 208,919,808 in the release, without its heads, and with the 1,536 of its
  # token types, which texts of one kind do not need.
  ("albef", "b16"): 208_919_808 - 1_536 + 1_017_917,
  ("simla", "b16"): 238_264_183,
  ("simla", "reference"): 238_264_183,
  # With eight temporal positions; 359,870,812 without.
  ("scl", "b16"): 359_870_812 + 6_144,
  ("scl", "reference"): 359_870_812 + 6_144,
}


def _stack(width, depth, mlp, cross=False):
  """Matrices, biases and norms of a stack, counted by hand."""
  attention = 4 * (width * width + width) + 2 * width
  feed_forward = 2 * width * mlp + width + mlp + 2 * width
  # The context has a norm of its own.
  crossed = attention + 2 * width if cross else 0
  return depth * (attention + crossed + feed_forward)


@pytest.mark.parametrize(
  ("size", "width", "depths", "mlps"),
  [
    ("b18", 768, (12, 12, 12), (3072, 3072)),
    ("l18", 1024, (24, 12, 12), (4096, 4096)),
    ("g18", 1408, (40, 18, 18), (6144, 5632)),
  ],
)
def test_coca_has_the_papers_parameters(size, width, depths, mlps):
  params = _params(f"configs/coca.py:{size}")
  layers = [
    _stack(width, depths[0], mlps[0]),
    _stack(width, depths[1], mlps[1]),
    _stack(width, depths[2], mlps[1], cross=True),
  ]
  tokens = 3 * 18**2 * width + 256 * width  # patches and their positions
  expected = {
    "vision": layers[0] + tokens + 2 * width,
    "text": layers[1] + (64_000 + 64 + 2) * width,  # and [CLS], its position
    "decoder": layers[2] + 2 * width,
    "vocabulary": 64_000 * width,
  }
  assert {name: _count(params[name]) for name in expected} == expected
  total, millions = PAPER[size]
  assert _count(params) == total
  assert round(sum(expected.values()) / 1e6) == millions


def test_simla_s_towers_are_those_of_the_paper():
  """ "223M": a ViT with a mask token, BERT with cross-attention, no heads."""
  params = _params("configs/simla.py:b16")
  vision = _count(params["vision"]) + _count(params["vision_norm"])
  assert vision == 85_845_504
  assert _count(params["stream"]) == 137_256_960


@pytest.mark.parametrize(("name", "size"), COUNTS)
def test_counts(name, size):
  assert _count(_params(f"configs/{name}.py:{size}")) == COUNTS[name, size]


OPENCLIP = (
  "data.image_size=224",
  "tokenizer.vocab_size=49408",
  "model.pooler.kind=openclip",
  "model.pooler.num_queries=256",
  "model.pooler.num_heads=8",
)


@pytest.mark.parametrize(
  ("overrides", "total"),
  [
    # coca_base: what coca.py:b16 is, but for the patches (288/18).
    (("data.image_size=288", "model.vision.patch_size=18"), 440_337_409),
    # coca_ViT-B-32 and coca_ViT-L-14.
    (
      (
        *OPENCLIP,
        "model.vision.patch_size=32",
        "model.pooler.width=512",
        "model.text.width=512",
        "model.text.num_heads=8",
        "model.decoder.width=512",
        "model.decoder.num_heads=8",
      ),
      253_560_065,
    ),
    (
      (
        *OPENCLIP,
        "model.embed_dim=768",
        "model.vision.patch_size=14",
        "model.vision.width=1024",
        "model.vision.depth=24",
        "model.vision.num_heads=16",
        "model.pooler.width=768",
      ),
      638_450_177,
    ),
  ],
)
def test_coca_has_open_clips_parameters(overrides, total):
  assert _count(_params("configs/coca.py:b16", *overrides)) == total


def test_presets_know_the_evaluators_fields():
  """They are written out there, where an evaluator cannot be imported."""
  for kind in evaluators.available():
    module = importlib.import_module(f"vlp_jax.evaluators.{kind}")
    fields = presets.EVAL_FIELDS.get(kind, {})
    assert fields == module.Evaluator.fields, kind


def _other(name, value):
  """Another value of a field, of the same type."""
  names = {
    "positions": ("learned", "sincos"),
    "stem": ("linear", "hmlp"),
    "pool": ("cls", "eot"),
    "activation": ("gelu", "relu2"),
    "remat": ("none", "full"),
    "dtype": ("bfloat16", "float32"),
    "attention": ("auto", "xla"),
    "kind": ("attention", "cascade"),
    "loss": ("softmax", "sigmoid"),
    "itc_reduction": ("mean", "sum"),
    "score": ("joint", "random"),
    "mask_stage": ("input", "tokens"),
    "target": ("normalized", "pixels"),
    "distance": ("l2", "l1"),
    "decoders": ("separate", "shared"),
    "visual_tokenizer": ("patches", "pixels"),
    "mlm_axis": ("vocabulary", "sequence"),
    "keyword_feature": ("embedding", "cls"),
    "negatives": ("random", "hard"),
    "word_pool": ("words", "padded"),
    "text_mask": ("exact", "replacement"),
    "frame_fill": ("zero", "interpolate"),
    "keyword_image": ("teacher", "student"),
    "patch_text": ("teacher", "student"),
    "init": ("bert", "clip"),
    "start": ("", "start.npz"),
    "visual_weights": ("", "weights.npz"),
    "stop_ids": ((), (1, 2)),
    "grounding_layer": (0, 1),
    "text_depth": (0, 1),
  }
  if name in names:
    return next(choice for choice in names[name] if choice != value)
  if isinstance(value, bool):
    return not value
  if isinstance(value, float):
    return value / 2 + 0.125
  if isinstance(value, int):
    return 2 * value or 4
  raise KeyError(name)


@pytest.mark.parametrize("name", SIZES)
def test_every_option_of_a_method_and_its_model_counts(name):
  """Whatever is set, another method is built: no option is idle."""
  spec = f"configs/{name}.py"
  text = ("model.pooler.num_queries=2", "model.vision.cls_token=true")
  if name in ("albef", "simla"):
    text = ("method.queue_size=64",)
  if name == "simla":
    text = (*text, "method.visual_tokenizer=dalle")
  if name == "scl":
    text = ()
  usual = base.get(name, config_lib.load(spec, text))
  fields = dict(config_lib.flatten(config_lib.load(spec, text)))
  idle = []
  for field, value in fields.items():
    section, _, last = field.rpartition(".")
    if section.split(".")[0] not in ("model", "method") or last == "name":
      continue
    items = [f"{field}={_other(last, value)}"]
    if name != "scl" and field in ("model.text.width", "model.decoder.width"):
      # The decoder continues the text tower.
      both = ("text", "decoder") if name != "clip" else ("text",)
      items = [f"model.{tower}.width={2 * value}" for tower in both]
    if name == "simla" and last == "width":  # patches go through the stream
      items = [f"model.{tower}.width=32" for tower in ("vision", "stream")]
    if name == "simla" and last == "patch_size":
      items += ["method.mask_patches=8"]
    other = base.get(name, config_lib.load(spec, [*text, *items]))
    if other == usual:
      idle.append(field)
  assert idle == []
  assert usual == base.get(name, config_lib.load(spec, text))


def test_every_common_option_is_read():
  """Somewhere in the package beside the file that declares it."""
  package = config_lib.find("configs/coca.py").parents[1] / "vlp_jax"
  read = set()
  for path in package.rglob("*.py"):
    if path.name == "presets.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
      # `section[f"{prefix}_steps"]`, and fields that are named by a string.
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        read.add(node.value)
  prefixes = {"total", "warmup"}
  read |= {
    f"{prefix}{suffix}"
    for prefix in prefixes
    for suffix in ("_steps", "_epochs", "_examples")
    if suffix in read
  }
  fields = dict(config_lib.flatten(config_lib.default_config()))
  names = {field.rpartition(".")[2] for field in fields}
  assert names - read == set()


def test_sycoca_adds_an_image_decoder_to_coca():
  sycoca, coca = (
    _state(config_lib.load(f"configs/{name}.py:b16")).params
    for name in ("sycoca", "coca")
  )
  assert set(sycoca) - set(coca) == {"image_decoder", "decoder_input", "pixels"}
  for name in coca:
    assert jax.tree.map(lambda x: x.shape, sycoca[name]) == jax.tree.map(
      lambda x: x.shape, coca[name]
    )
