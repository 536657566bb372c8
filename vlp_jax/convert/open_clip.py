"""open_clip's CoCa: its state dict and `Captioner`'s parameters.

Two arrangements, by `config.model.pooler.kind`: `cls` is open_clip's
`coca_base`, `openclip` is `coca_ViT-B-32` and the like. A state dict of NumPy
arrays comes from PyTorch by

  state = {k: v.float().numpy() for k, v in model.state_dict().items()}
  params = from_open_clip(state, config)

or from `safetensors.numpy.load_file`. Weights that open_clip trained belong
to its own token ids and pictures, and to `model.text.legacy_cls_mask=True`.

The whole mapping is one table (`_rules`): each of open_clip's tensors, and
the parts of it, along its first axis, that are parameters here. Parameters
of a stack's layers are one array here, and a tensor each there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from vlp_jax.errors import UserError

KINDS = ("cls", "openclip")


class _Part(NamedTuple):
  """A parameter, as a part of one of open_clip's tensors.

  Attributes:
    path: of the parameter, joined by "/".
    ours: its shape, without the axis of layers.
    theirs: the part's shape.
    axes: the part, transposed by these, is the parameter reshaped.
  """

  path: str
  ours: tuple[int, ...]
  theirs: tuple[int, ...]
  axes: tuple[int, ...]

  def load(self, part: np.ndarray) -> np.ndarray:
    return part.transpose(self.axes).reshape(self.ours)

  def store(self, array: np.ndarray) -> np.ndarray:
    shape = [self.theirs[axis] for axis in self.axes]
    return array.reshape(shape).transpose(np.argsort(self.axes))


class _Rule(NamedTuple):
  """One of open_clip's tensors.

  Attributes:
    name: its name; "{}" stands for the number of the layer.
    parts: what it consists of.
    depth: number of layers that have one; 0 if it is no part of a stack.
  """

  name: str
  parts: tuple[_Part, ...]
  depth: int = 0

  @property
  def names(self) -> list[str]:
    if not self.depth:
      return [self.name]
    return [self.name.format(layer) for layer in range(self.depth)]

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.parts[0].theirs
    if len(self.parts) == 1:
      return first
    return (sum(part.theirs[0] for part in self.parts), *first[1:])

  def cut(self, tensor: np.ndarray) -> list[np.ndarray]:
    if len(self.parts) == 1:
      return [tensor]
    ends = np.cumsum([part.theirs[0] for part in self.parts])
    return np.split(tensor, ends[:-1])


def from_open_clip(
  state_dict: Mapping[str, np.ndarray], config: ConfigDict
) -> dict[str, Any]:
  """Makes parameters of a `Captioner` from those of open_clip's CoCa.

  Args:
    state_dict: arrays by open_clip's names. Every one is used exactly once.
    config: reads `model`, `tokenizer.vocab_size` and `data.image_size`.

  Returns:
    The parameters: nested dicts of float32 arrays. A method with more of them
    (SyCoCa) finds the others in its own initialisation.

  Raises:
    UserError: if the config is of another architecture; if tensors are
      missing, left over, or of another shape than the config says.
  """
  rules = _rules(config)
  expected = {name: rule.shape for rule in rules for name in rule.names}
  _check("the state dict", expected, state_dict)
  params = {}
  for rule in rules:
    layers = [rule.cut(np.array(state_dict[n], np.float32)) for n in rule.names]
    for i, part in enumerate(rule.parts):
      loaded = [part.load(layer[i]) for layer in layers]
      params[part.path] = np.stack(loaded) if rule.depth else loaded[0]
  return traverse_util.unflatten_dict(params, sep="/")


def to_open_clip(
  params: Mapping[str, Any], config: ConfigDict
) -> dict[str, np.ndarray]:
  """Does the inverse of `from_open_clip`.

  Args:
    params: of a `Captioner`; or anything of that structure, such as its
      gradient. Every array is used exactly once.
    config: as in `from_open_clip`.

  Returns:
    float32 arrays by open_clip's names.

  Raises:
    UserError: as `from_open_clip` does.
  """
  arrays = traverse_util.flatten_dict(dict(params), sep="/")
  rules = _rules(config)
  expected = {
    part.path: (rule.depth, *part.ours) if rule.depth else part.ours
    for rule in rules
    for part in rule.parts
  }
  _check("the parameters", expected, arrays)
  state_dict = {}
  for rule in rules:
    for layer, name in enumerate(rule.names):
      parts = []
      for part in rule.parts:
        array = np.asarray(arrays[part.path], np.float32)
        parts.append(part.store(array[layer] if rule.depth else array))
      whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
      state_dict[name] = np.array(whole, order="C")
  return state_dict


def _check(
  what: str, expected: Mapping[str, tuple], arrays: Mapping[str, Any]
) -> None:
  """Raises a `UserError` unless names and shapes are the expected ones."""
  problems = []
  if missing := sorted(expected.keys() - arrays.keys()):
    problems.append(f"missing: {', '.join(missing)}")
  if left := sorted(arrays.keys() - expected.keys()):
    problems.append(f"left over: {', '.join(left)}")
  wrong = [
    f"{name} {np.shape(arrays[name])} instead of {shape}"
    for name, shape in expected.items()
    if name in arrays and np.shape(arrays[name]) != shape
  ]
  if wrong:
    problems.append(f"of another shape: {', '.join(wrong)}")
  if problems:
    raise UserError(f"{what} and the config do not fit; {'; '.join(problems)}")


# --- The table --------------------------------------------------------------

_Rules = list[_Rule]


def _rules(config: ConfigDict) -> _Rules:
  """Lists open_clip's tensors for a config.

  Raises:
    UserError: if open_clip's CoCa has no such architecture.
  """
  _check_architecture(config)
  model, vocabulary = config.model, config.tokenizer.vocab_size
  vision, text, decoder, pooler = (
    model[name] for name in ("vision", "text", "decoder", "pooler")
  )
  size = vision.patch_size
  patches = (config.data.image_size // size) ** 2
  v, t, joint = vision.width, text.width, model.embed_dim
  out = pooler.width if pooler.kind == "openclip" else v
  # OIHW there, HWIO here.
  kernel = _Part("kernel", (size, size, 3, v), (v, 3, size, size), (2, 3, 1, 0))
  rules = [
    _same("logit_scale", "temperature/logit_scale", ()),
    *_under("visual.conv1", "vision/patch", [_Rule("weight", (kernel,))]),
    _same("visual.class_embedding", "vision/cls", (v,)),
    _Rule(
      "visual.positional_embedding",
      (
        _part("vision/cls_pos", (v,), (1, v)),
        _part("vision/pos", (patches, v)),
      ),
    ),
    *_under("visual.ln_pre", "vision/norm", _norm(v)),
    *_stack("visual.transformer.resblocks", "vision", vision, _block(vision)),
    *_under("visual.ln_post", "image_pool/norm", _norm(out)),
    _same("visual.proj", "image_pool/projection/kernel", (out, joint)),
    _same(
      "text.token_embedding.weight", "text/embedding/embedding", (vocabulary, t)
    ),
    _same("text.cls_emb", "text/cls", (t,)),
    _Rule(  # here [CLS] comes last
      "text.positional_embedding",
      (
        _part("text/pos", (text.max_len, t)),
        _part("text/cls_pos", (t,), (1, t)),
      ),
    ),
    *_stack("text.transformer.resblocks", "text", text, _block(text)),
    *_under("text.ln_final", "text_projection/norm", _norm(t)),
    _same(
      "text.text_projection", "text_projection/projection/kernel", (t, joint)
    ),
    # Two of open_clip's blocks are one here.
    *_stack(
      "text_decoder.resblocks",
      "decoder",
      decoder,
      _block(decoder, "self_mlp_norm", "self_mlp"),
    ),
    *_stack(
      "text_decoder.cross_attn", "decoder", decoder, _cross_block(decoder)
    ),
    *_under("text_decoder.ln_final", "decoder/norm", _norm(t)),
    _same("text_decoder.text_projection", "vocabulary/kernel", (t, vocabulary)),
  ]
  if pooler.kind == "openclip":
    pool = _pool(v, pooler)
    rules += _under("visual.attn_pool", "image_pool/generative", pool)
  return rules


def _check_architecture(config: ConfigDict) -> None:
  model = config.model
  if "decoder" not in model:
    raise UserError(
      f"config.method.name={config.method.name} has no text decoder, which "
      "open_clip's CoCa has"
    )

  def field(name):
    return functools.reduce(getattr, name.split("."), model)

  needed = {
    "activation": ("gelu",),
    "vision.cls_token": (True,),
    "vision.pre_norm": (True,),
    "text.pool": ("cls",),
    "decoder.cross_mlp": (True,),
    "pooler.kind": KINDS,
  }
  for name, values in needed.items():
    if field(name) not in values:
      raise UserError(
        f"open_clip's CoCa has no config.model.{name}={field(name)}; set it to "
        f"{' or '.join(map(str, values))}"
      )
  pooled = ("vision.width",)
  if model.pooler.kind == "openclip":
    pooled = ("pooler.width", "embed_dim")
  names = ("text.width", "decoder.width", *pooled)
  if len({field(name) for name in names}) > 1:
    text = ", ".join(f"config.model.{name}={field(name)}" for name in names)
    raise UserError(f"open_clip's CoCa needs equal widths, not {text}")


def _under(theirs: str, ours: str, rules: Iterable[_Rule]) -> _Rules:
  """Puts rules of a module under the names that it has as a part."""
  return [
    rule._replace(
      name=f"{theirs}.{rule.name}",
      parts=tuple(
        part._replace(path=f"{ours}/{part.path}") for part in rule.parts
      ),
    )
    for rule in rules
  ]


def _stack(theirs: str, ours: str, tower: ConfigDict, block: _Rules) -> _Rules:
  rules = _under(theirs + ".{}", f"{ours}/transformer/layers", block)
  return [rule._replace(depth=tower.depth) for rule in rules]


def _part(path, ours: tuple[int, ...], theirs=None) -> _Part:
  """A part that is not transposed; `theirs` defaults to `ours`."""
  theirs = ours if theirs is None else theirs
  return _Part(path, ours, theirs, tuple(range(len(theirs))))


def _same(theirs: str, ours: str, shape: tuple[int, ...]) -> _Rule:
  return _Rule(theirs, (_part(ours, shape),))


def _norm(width: int) -> _Rules:
  return [_same("weight", "scale", (width,)), _same("bias", "bias", (width,))]


def _linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Rules:
  """PyTorch's `Linear`, and a `DenseGeneral` over these axes."""
  shape = (math.prod(outputs), math.prod(inputs))
  return [
    _Rule("weight", (_Part("kernel", inputs + outputs, shape, (1, 0)),)),
    _Rule("bias", (_part("bias", outputs, shape[:1]),)),
  ]


def _packed(width: int, heads: int, **counts: int) -> tuple[_Rule, _Rule]:
  """PyTorch's one matrix for query, key and value: `in_proj_*`.

  Args:
    width: channels.
    heads: number of heads.
    **counts: the modules that they are made by here, in this order, and how
      many of the three each makes.
  """
  head = (heads, width // heads)
  parts = []
  for name, count in counts.items():
    outputs = head if count == 1 else (count, *head)
    linear = _under("", name, _linear((width,), outputs))
    parts.append([rule.parts[0] for rule in linear])
  weights, biases = zip(*parts, strict=True)
  return _Rule("in_proj_weight", weights), _Rule("in_proj_bias", biases)


def _attention(width: int, heads: int, **counts: int) -> _Rules:
  head = (heads, width // heads)
  out = _under("out_proj", "out/proj", _linear(head, (width,)))
  return [*_packed(width, heads, **counts), *out]


def _mlp(tower: ConfigDict) -> _Rules:
  width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
  return [
    *_under("c_fc", "up", _linear((width,), (hidden,))),
    *_under("c_proj", "down", _linear((hidden,), (width,))),
  ]


def _block(tower: ConfigDict, norm: str = "mlp_norm", mlp: str = "mlp"):
  """open_clip's `ResidualAttentionBlock` as self-attention."""
  attention = _attention(tower.width, tower.num_heads, qkv=3)
  return [
    *_under("ln_1", "self_norm", _norm(tower.width)),
    *_under("attn", "self_attention", attention),
    *_under("ln_2", norm, _norm(tower.width)),
    *_under("mlp", mlp, _mlp(tower)),
  ]


def _cross_block(tower: ConfigDict) -> _Rules:
  """open_clip's `ResidualAttentionBlock` as cross-attention."""
  attention = _attention(tower.width, tower.num_heads, q=1, kv=2)
  return [
    *_under("ln_1", "cross_norm", _norm(tower.width)),
    *_under("ln_1_kv", "context_norm", _norm(tower.width)),
    *_under("attn", "cross_attention", attention),
    *_under("ln_2", "mlp_norm", _norm(tower.width)),
    *_under("mlp", "mlp", _mlp(tower)),
  ]


def _pool(tokens: int, pooler: ConfigDict) -> _Rules:
  """open_clip's `AttentionalPooler`; `tokens`: channels that it reads."""
  width, heads = pooler.width, pooler.num_heads
  head = (heads, width // heads)
  weight, bias = _packed(width, heads, q=1, k=1, v=1)
  # PyTorch packs the three matrices only where their sizes are equal.
  weights = [weight]
  if tokens != width:
    weights = [
      *_under("q_proj_weight", "q", _linear((width,), head)[:1]),
      *_under("k_proj_weight", "k", _linear((tokens,), head)[:1]),
      *_under("v_proj_weight", "v", _linear((tokens,), head)[:1]),
    ]
    weights = [r._replace(name=r.name.removesuffix(".weight")) for r in weights]
  return [
    _same("query", "query", (pooler.num_queries, width)),
    *_under("ln_q", "query_norm", _norm(width)),
    *_under("ln_k", "token_norm", _norm(tokens)),
    *(rule._replace(name=f"attn.{rule.name}") for rule in (*weights, bias)),
    *_under("attn.out_proj", "out", _linear(head, (width,))),
  ]
