"""python -m vlp_jax.convert.scl --config=configs/scl.py:b16 \\
    --clip=FILE --roberta=FILE --output=start.npz

Weights of SCL's releases, and of OpenAI's CLIP and RoBERTa, from which SCL
starts. What the command writes, `--config.model.start=start.npz` starts from;
`--released=FILE` is a whole model (the Lightning checkpoint) instead of the
two towers. Files are .npz, .safetensors, or what `torch.save` wrote (read with
`weights_only=True`).

  params, left_out = from_scl(state, config)     a whole model
  state = to_scl(params, config)                 the way back
  params, left_out = towers(config, clip, roberta)

Every tensor is used once, or is one of those that `LEFT_OUT` lists with the
reason, or is an error. Positions are resized to the config's pictures, and
temporal ones to its frames:

- a model without temporal positions gets the first row in its others, so that
  pictures are what they were;
- a checkpoint without them (of pictures alone) gives rows of zeros.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlp_jax import command
from vlp_jax import config as config_lib
from vlp_jax.convert import npz, state_dict, table
from vlp_jax.convert.table import (
  Rule,
  Rules,
  State,
  linear,
  mlp,
  norm,
  part,
  resblock,
  same,
  under,
)
from vlp_jax.errors import UserError
from vlp_jax.ops import patches as patches_lib

FLAGS = {"clip": "", "roberta": "", "released": "", "output": ""}
VISION = "vision_transformer.visual"
TEXT = "text_transformer"
# Patterns of tensors that have no use here, and why, by the kind of file.
LEFT_OUT = {
  "released": {
    r"vision_transformer\.(decoder_.*|mask_token)": "an unused MAE decoder",
    rf"{re.escape(VISION)}\.visual_mask_token": "of GLSCL",
    rf"{TEXT}\.pooler\..*": "an unused pooler",
    rf"{TEXT}\.embeddings\.position_ids": "no weights",
    r"(vqa_classifier|nlvr2_classifier|rank_output)\..*": "of another task",
  },
  "clip": {
    r"visual\.proj": "into CLIP's joint space",
    r"(transformer|token_embedding|ln_final)\..*": "CLIP's text tower",
    r"(positional_embedding|text_projection|logit_scale)": "CLIP's text tower",
    r"(input_resolution|context_length|vocab_size)": "no weights",
  },
  "roberta": {
    r"pooler\..*": "an unused pooler",
    r"lm_head\..*": "SCL's own is trained anew",
    r"embeddings\.position_ids": "no weights",
  },
}


class Converted(NamedTuple):
  """What a state dict became.

  Attributes:
    params: nested dicts of float32 arrays.
    left_out: the names of tensors that have no use here, with the reasons.
  """

  params: dict[str, Any]
  left_out: dict[str, str]


def from_scl(state: State, config: ConfigDict) -> Converted:
  """Makes parameters of an `SCLEncoder` from those of a release.

  Args:
    state: arrays by the release's names.
    config: of the run that will use them; reads `model.{vision,text,fusion}`,
      `model.embed_dim`, `tokenizer.vocab_size` and `data.image_size`.

  Raises:
    UserError: if tensors are missing, left over, or of another shape than the
      config says.
  """
  used, left_out = _sort(state, LEFT_OUT["released"])
  used = _fit_vision(used, f"{VISION}.", config)
  types = "token_type_embeddings.weight"
  if types in used:  # a third row is of a second picture, in NLVR2
    used[types] = used[types][:2]
  return Converted(table.load(_rules(config), used), left_out)


def to_scl(params: Mapping[str, Any], config: ConfigDict) -> State:
  """Does the inverse of `from_scl`, without what that leaves out."""
  return table.store(_rules(config), params)


def towers(
  config: ConfigDict, clip: State | None = None, roberta: State | None = None
) -> Converted:
  """Makes the parameters that published towers have for an `SCLEncoder`.

  Args:
    config: of the run that will start from them.
    clip: an OpenAI CLIP with a vision transformer, or None. Blocks beyond the
      config's depth are left out: SCL and METER take 11 of 12.
    roberta: a RoBERTa, with or without its head for hidden words, or None.

  Raises:
    UserError: as `from_scl` does.
  """
  params, left_out = {}, {}
  if clip is not None:
    used, left = _sort(clip, LEFT_OUT["clip"])
    block = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
    for name in list(used):
      match = block.match(name)
      if match and int(match[1]) >= config.model.vision.depth:
        del used[name]
        left[name] = "beyond config.model.vision.depth"
    used = _fit_vision(used, "visual.", config)
    params |= table.load(under("visual", "", _vision(config)), used)
    left_out |= left
  if roberta is not None:
    roberta = {k.removeprefix("roberta."): v for k, v in roberta.items()}
    used, left = _sort(roberta, LEFT_OUT["roberta"])
    params |= table.load(_text(config), used)
    left_out |= left
  return Converted(params, left_out)


def main(argv: Sequence[str]) -> None:
  """Runs the command; `argv` is without the program's name."""
  config, flags = config_lib.parse_command_line(argv, FLAGS, __doc__)
  towers_given = flags["clip"] or flags["roberta"]
  if bool(flags["released"]) == bool(towers_given) or not flags["output"]:
    raise UserError(
      "give --output=FILE.npz, and --clip=FILE, --roberta=FILE or both, or "
      "--released=FILE"
    )
  output = pathlib.Path(flags["output"]).expanduser()
  npz.check_name(output)
  if flags["released"]:
    found = from_scl(state_dict.read(flags["released"]), config)
  else:
    names = [name for name in ("clip", "roberta") if flags[name]]
    states = {name: state_dict.read(flags[name]) for name in names}
    found = towers(config, **states)
  for reason in dict.fromkeys(found.left_out.values()):
    names = [name for name, why in found.left_out.items() if why == reason]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    print(f"left out, {reason}: {names[0]}{more}")
  print(f"{npz.write(output, found.params):,} parameters, in {output}")


def _sort(
  state: State, left_out: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Splits a state dict: what may be used; names of the rest, with reasons."""
  used, left = {}, {}
  for name, tensor in state.items():
    why = [w for p, w in left_out.items() if re.fullmatch(p, name)]
    if why:
      left[name] = why[0]
    else:
      used[name] = tensor
  return used, left


def _fit_vision(
  state: dict[str, np.ndarray], prefix: str, config: ConfigDict
) -> dict[str, np.ndarray]:
  """Resizes a vision tower's positions to the config's pictures and frames."""
  section = config.model.vision
  name, when = f"{prefix}positional_embedding", f"{prefix}temporal_embed"
  if name not in state:  # which the table will say
    return state
  pos = np.asarray(state[name], np.float32)
  temporal = state.get(when, np.zeros((1, 1, pos.shape[1])))
  temporal = np.asarray(temporal, np.float32)[0]
  state = {k: v for k, v in state.items() if k != when}
  if section.frames:
    rows = patches_lib.resize_frames(temporal, section.frames, "zero")
    state[when] = np.asarray(rows)[None]
  else:
    pos = pos + temporal[0]
  side = config.data.image_size // section.patch_size
  old = round((len(pos) - 1) ** 0.5)
  if old**2 == len(pos) - 1:
    grid = patches_lib.resize_positions(pos[1:], (old, old), (side, side))
    pos = np.concatenate([pos[:1], grid])
  return state | {name: pos}


# --- The table --------------------------------------------------------------


def _rules(config: ConfigDict) -> Rules:
  """Lists the release's tensors for a config."""
  model, vocabulary = config.model, config.tokenizer.vocab_size
  v, t, width = (model[k].width for k in ("vision", "text", "fusion"))
  rules = [
    *under(VISION, "", _vision(config)),
    *under(TEXT, "", _text(config)),
    same("token_type_embeddings.weight", "fusion/types", (2, width)),
    *under("itm_score.fc", "matching", linear((2 * width,), (2,))),
    *under("mlm_score.transform.dense", "words/transform", _square(width)),
    *under("mlm_score.transform.LayerNorm", "words/norm", norm(width)),
    *under(
      "mlm_score.decoder", "vocabulary", linear((width,), (vocabulary,))[:1]
    ),
    same("mlm_score.bias", "words/bias", (vocabulary,)),
    same("cl_temp", "temperature/value", ()),
  ]
  for name, inputs in (("text", t), ("image", v)):
    cross = f"cross_modal_{name}"
    rules += [
      *under(f"{cross}_transform", f"{name}_in", linear((inputs,), (width,))),
      *under(f"{cross}_pooler.dense", f"fusion/{name}_pool", _square(width)),
      *table.stack(
        f"{cross}_layers",
        "fusion",
        model.fusion.depth,
        under("", name, _bert_layer(model.fusion, cross=True)),
      ),
    ]
  for name, theirs in (("text", "language"), ("image", "vision")):
    head = [
      *under("0", "hidden", _square(width)),
      *under("1", "norm", norm(width)),
      *under("3", "projection", linear((width,), (model.embed_dim,))),
    ]
    rules += under(f"{theirs}_proj", f"{name}_projection", head)
  return rules


def _vision(config: ConfigDict) -> Rules:
  """CLIP's vision transformer, and SCL's temporal positions."""
  tower = config.model.vision
  width, size = tower.width, tower.patch_size
  count = (config.data.image_size // size) ** 2
  rules = [
    *under("conv1", "vision/patch", [table.patches(size, width)]),
    same("class_embedding", "vision/cls", (width,)),
    Rule(
      ("positional_embedding",),
      (
        part("vision/cls_pos", (width,), (1, width)),
        part("vision/pos", (count, width)),
      ),
    ),
    *under("ln_pre", "vision/norm", norm(width)),
    *table.stack(
      "transformer.resblocks",
      "vision/transformer",
      tower.depth,
      resblock(tower),
    ),
    *under("ln_post", "vision_norm", norm(width)),
  ]
  if tower.frames:
    shape = (tower.frames, width)
    temporal = part("vision/temporal", shape, (1, *shape))
    rules.append(Rule(("temporal_embed",), (temporal,)))
  return rules


def _text(config: ConfigDict) -> Rules:
  """RoBERTa, by the names that it has in transformers."""
  tower, vocabulary = config.model.text, config.tokenizer.vocab_size
  width = tower.width
  embeddings = [
    same("word_embeddings.weight", "embedding/embedding", (vocabulary, width)),
    same("position_embeddings.weight", "pos", (2 + tower.max_len, width)),
    Rule(
      ("token_type_embeddings.weight",), (part("type", (width,), (1, width)),)
    ),
    *under("LayerNorm", "norm", norm(width)),
  ]
  return [
    *under("embeddings", "text", embeddings),
    *table.stack(
      "encoder.layer", "text/transformer", tower.depth, _bert_layer(tower)
    ),
  ]


def _bert_layer(tower: ConfigDict, *, cross: bool = False) -> Rules:
  """A layer of a BERT in transformers: one matrix each for q, k and v."""
  width, heads = tower.width, tower.num_heads
  head = (heads, width // heads)

  def attention(**made_of: tuple[str, ...]) -> Rules:
    rules = under("output.dense", "out/proj", linear(head, (width,)))
    for name, names in made_of.items():
      outputs = head if len(names) == 1 else (len(names), *head)
      for rule in under("", name, linear((width,), outputs)):
        tensors = tuple(f"self.{n}.{rule.tensors[0]}" for n in names)
        rules.append(rule._replace(tensors=tensors))
    return rules

  own = attention(qkv=("query", "key", "value"))
  rules = [
    *under("attention", "self_attention", own),
    *under("attention.output.LayerNorm", "self_norm", norm(width)),
    *under("", "mlp", mlp(tower, "intermediate.dense", "output.dense")),
    *under("output.LayerNorm", "mlp_norm", norm(width)),
  ]
  if cross:
    other = attention(q=("query",), kv=("key", "value"))
    rules += [
      *under("crossattention", "cross_attention", other),
      *under("crossattention.output.LayerNorm", "cross_norm", norm(width)),
    ]
  return rules


def _square(width: int) -> Rules:
  return linear((width,), (width,))


if __name__ == "__main__":
  command.execute(main)
