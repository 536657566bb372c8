"""open_clip's CoCa: its state dict and `Captioner`'s parameters.

Two arrangements, by `config.model.pooler.kind`: `cls` is open_clip's
`coca_base`, `openclip` is `coca_ViT-B-32` and the like. A state dict of NumPy
arrays comes from PyTorch by

  state = {k: v.float().numpy() for k, v in model.state_dict().items()}
  params = from_open_clip(state, config)

or from `safetensors.numpy.load_file`. Weights that open_clip trained belong
to its own token ids and pictures, and to `model.text.legacy_cls_mask=True`.

The whole mapping is one table (`_rules`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.convert import table
from vlp_jax.convert.table import (
  Rule,
  Rules,
  attention,
  linear,
  mlp,
  norm,
  packed,
  part,
  resblock,
  same,
  under,
)
from vlp_jax.errors import UserError

KINDS = ("cls", "openclip")


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
  return table.load(_rules(config), state_dict)


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
  return table.store(_rules(config), params)


# --- The table --------------------------------------------------------------


def _rules(config: ConfigDict) -> Rules:
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
  rules = [
    same("logit_scale", "temperature/logit_scale", ()),
    *under("visual.conv1", "vision/patch", [table.patches(size, v)]),
    same("visual.class_embedding", "vision/cls", (v,)),
    Rule(
      ("visual.positional_embedding",),
      (
        part("vision/cls_pos", (v,), (1, v)),
        part("vision/pos", (patches, v)),
      ),
    ),
    *under("visual.ln_pre", "vision/norm", norm(v)),
    *_stack("visual.transformer.resblocks", "vision", vision, resblock(vision)),
    *under("visual.ln_post", "image_pool/norm", norm(out)),
    same("visual.proj", "image_pool/projection/kernel", (out, joint)),
    same(
      "text.token_embedding.weight", "text/embedding/embedding", (vocabulary, t)
    ),
    same("text.cls_emb", "text/cls", (t,)),
    Rule(  # here [CLS] comes last
      ("text.positional_embedding",),
      (
        part("text/pos", (text.max_len, t)),
        part("text/cls_pos", (t,), (1, t)),
      ),
    ),
    *_stack("text.transformer.resblocks", "text", text, resblock(text)),
    *under("text.ln_final", "text_projection/norm", norm(t)),
    same(
      "text.text_projection", "text_projection/projection/kernel", (t, joint)
    ),
    # Two of open_clip's blocks are one here.
    *_stack(
      "text_decoder.resblocks",
      "decoder",
      decoder,
      resblock(decoder, "self_mlp_norm", "self_mlp"),
    ),
    *_stack(
      "text_decoder.cross_attn", "decoder", decoder, _cross_block(decoder)
    ),
    *under("text_decoder.ln_final", "decoder/norm", norm(t)),
    same("text_decoder.text_projection", "vocabulary/kernel", (t, vocabulary)),
  ]
  if pooler.kind == "openclip":
    pool = _pool(v, pooler)
    rules += under("visual.attn_pool", "image_pool/generative", pool)
  return rules


def _stack(theirs: str, ours: str, tower: ConfigDict, block: Rules) -> Rules:
  return table.stack(theirs, f"{ours}/transformer", tower.depth, block)


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


def _cross_block(tower: ConfigDict) -> Rules:
  """open_clip's `ResidualAttentionBlock` as cross-attention."""
  cross = attention(tower.width, tower.num_heads, q=1, kv=2)
  return [
    *under("ln_1", "cross_norm", norm(tower.width)),
    *under("ln_1_kv", "context_norm", norm(tower.width)),
    *under("attn", "cross_attention", cross),
    *under("ln_2", "mlp_norm", norm(tower.width)),
    *under("mlp", "mlp", mlp(tower, "c_fc", "c_proj")),
  ]


def _pool(tokens: int, pooler: ConfigDict) -> Rules:
  """open_clip's `AttentionalPooler`; `tokens`: channels that it reads."""
  width, heads = pooler.width, pooler.num_heads
  head = (heads, width // heads)
  weight, bias = packed(width, heads, q=1, k=1, v=1)
  # PyTorch packs the three matrices only where their sizes are equal.
  weights = [weight]
  if tokens != width:
    weights = [
      *under("q_proj_weight", "q", linear((width,), head)[:1]),
      *under("k_proj_weight", "k", linear((tokens,), head)[:1]),
      *under("v_proj_weight", "v", linear((tokens,), head)[:1]),
    ]
    weights = [
      rule._replace(tensors=(rule.tensors[0].removesuffix(".weight"),))
      for rule in weights
    ]
  return [
    same("query", "query", (pooler.num_queries, width)),
    *under("ln_q", "query_norm", norm(width)),
    *under("ln_k", "token_norm", norm(tokens)),
    *(
      rule._replace(tensors=(f"attn.{rule.tensors[0]}",))
      for rule in (*weights, bias)
    ),
    *under("attn.out_proj", "out", linear(head, (width,))),
  ]
