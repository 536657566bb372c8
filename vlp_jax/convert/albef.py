"""python -m vlp_jax.convert.albef --config=configs/simla.py:b16 \\
    --deit=FILE --bert=FILE --output=start.npz

Weights of ALBEF's and SIMLA's releases, and of DeiT and BERT. What the command
writes, `--config.model.start=start.npz` starts from; `--released=FILE` is a
whole model instead of the two towers. Files are .npz, .safetensors, or what
`torch.save` wrote (read with `weights_only=True`).

The releases' state dicts hold a DeiT under `visual_encoder.` and a BERT under
`text_encoder.`, so one table serves all four. A state dict of NumPy arrays
comes from PyTorch by `{k: v.float().numpy() for k, v in state.items()}`, or
from `safetensors.numpy.load_file`.

  params = from_albef(state, config)    a whole model
  params = towers(config, deit, bert)   what the papers start from

Token-type embeddings and poolers are left out: neither method uses them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlp_jax import command
from vlp_jax import config as config_lib
from vlp_jax.convert import npz, state_dict
from vlp_jax.errors import UserError
from vlp_jax.ops import patches as patches_lib

FLAGS = {"deit": "", "bert": "", "released": "", "output": ""}
State = Mapping[str, np.ndarray]
_Get = Callable[[str], np.ndarray]


def from_albef(state: State, config: ConfigDict) -> dict[str, Any]:
  """Returns the parameters of a released ALBEF or SIMLA.

  Args:
    state: tensors by name, without the teacher's (`..._m`) if you like.
    config: of the run that will use them: sizes, and which method.

  Raises:
    UserError: if a tensor is missing.
  """
  get = _getter(state, "the state dict")
  params = {
    **_vision(lambda name: get(f"visual_encoder.{name}"), config),
    **_language(lambda name: get(f"text_encoder.{name}"), config, cross=True),
    "image_projection": {"projection": _dense(get, "vision_proj")},
    "text_projection": {"projection": _dense(get, "text_proj")},
    "matching": {"projection": _dense(get, "itm_head")},
    "temperature": {"value": get("temp").reshape(())},
  }
  if "visual_encoder.mask_token" in state:
    params["vision"]["mask_token"] = get("visual_encoder.mask_token")[0, 0]
    params["patch_head"] = {"projection": _dense(get, "mim_head")}
    params["keyword_head"] = {"projection": _dense(get, "concept_head")}
  return params


def towers(
  config: ConfigDict, deit: State | None = None, bert: State | None = None
) -> dict[str, Any]:
  """Returns the parameters that published towers have for a model.

  Args:
    config: of the run that will start from them.
    deit: a ViT of DeiT or timm, or None.
    bert: a BERT for masked language modelling, or None.

  Raises:
    UserError: if a tensor is missing.
  """
  found: dict[str, Any] = {}
  if deit is not None:
    found |= _vision(_getter(deit, "the vision transformer"), config)
  if bert is not None:
    found |= _language(_getter(bert, "the BERT"), config, cross=False)
  return found


def main(argv: Sequence[str]) -> None:
  """Runs the command; `argv` is without the program's name."""
  config, flags = config_lib.parse_command_line(argv, FLAGS, __doc__)
  towers_given = flags["deit"] or flags["bert"]
  if bool(flags["released"]) == bool(towers_given) or not flags["output"]:
    raise UserError(
      "give --output=FILE.npz, and --deit=FILE, --bert=FILE or both, or "
      "--released=FILE"
    )
  output = pathlib.Path(flags["output"]).expanduser()
  npz.check_name(output)
  if flags["released"]:
    params = from_albef(state_dict.read(flags["released"]), config)
  else:
    states = {
      k: state_dict.read(flags[k]) for k in ("deit", "bert") if flags[k]
    }
    params = towers(config, **states)
  print(f"{npz.write(output, params):,} parameters, in {output}")


def _getter(state: State, what: str) -> _Get:
  def get(name: str) -> np.ndarray:
    if name not in state:
      raise UserError(f"{what} has no tensor {name!r}")
    return np.asarray(state[name], np.float32)

  return get


def _dense(get: _Get, name: str) -> dict[str, np.ndarray]:
  return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}


def _norm(get: _Get, name: str) -> dict[str, np.ndarray]:
  return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def _stacked(layers: list[Any]) -> Any:
  """Stacks equal trees along a new first axis."""
  if isinstance(layers[0], Mapping):
    return {k: _stacked([layer[k] for layer in layers]) for k in layers[0]}
  return np.stack(layers)


def _heads(get: _Get, names: list[str], heads: int) -> dict[str, np.ndarray]:
  """Joins matrices from D to heads: kernel `[D, n, N, H]`, bias `[n, N, H]`."""
  weights = [get(f"{name}.weight") for name in names]
  biases = [get(f"{name}.bias") for name in names]
  width = weights[0].shape[0]
  kernel = np.stack(
    [w.T.reshape(-1, heads, width // heads) for w in weights], 1
  )
  return {"kernel": kernel, "bias": np.stack(biases).reshape(kernel.shape[1:])}


def _out(get: _Get, name: str, heads: int) -> dict[str, Any]:
  dense = _dense(get, name)
  width = dense["kernel"].shape[1]
  kernel = dense["kernel"].reshape(heads, -1, width)
  return {"proj": {"kernel": kernel, "bias": dense["bias"]}}


def _vision(get: _Get, config: ConfigDict) -> dict[str, Any]:
  section = config.model.vision
  heads, width = section.num_heads, section.width

  def layer(i: int) -> dict[str, Any]:
    block = f"blocks.{i}"
    qkv = _dense(get, f"{block}.attn.qkv")
    shape = (3, heads, width // heads)
    return {
      "self_norm": _norm(get, f"{block}.norm1"),
      "self_attention": {
        "qkv": {
          "kernel": qkv["kernel"].reshape(width, *shape),
          "bias": qkv["bias"].reshape(shape),
        },
        "out": _out(get, f"{block}.attn.proj", heads),
      },
      "mlp_norm": _norm(get, f"{block}.norm2"),
      "mlp": {
        "up": _dense(get, f"{block}.mlp.fc1"),
        "down": _dense(get, f"{block}.mlp.fc2"),
      },
    }

  pos = get("pos_embed")[0]
  side = config.data.image_size // section.patch_size
  old = round((len(pos) - 1) ** 0.5)
  resized = patches_lib.resize_positions(pos[1:], (old, old), (side, side))
  return {
    "vision": {
      "patch": {
        "kernel": get("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "bias": get("patch_embed.proj.bias"),
      },
      "cls": get("cls_token")[0, 0],
      "cls_pos": pos[0],
      "pos": np.asarray(resized),
      "transformer": {
        "layers": _stacked([layer(i) for i in range(section.depth)])
      },
    },
    "vision_norm": _norm(get, "norm"),
  }


def _language(get: _Get, config: ConfigDict, *, cross: bool) -> dict[str, Any]:
  """The stream and its head for hidden words, from a BERT.

  Args:
    get: gives tensors by the names of a BERT for masked language modelling.
    config: of the run.
    cross: whether the BERT has cross-attention in its upper layers.
  """
  section = config.model.stream
  heads = section.num_heads

  def attention(name: str, parts: list[list[str]], keys: list[str]):
    inputs = {
      key: _heads(get, [f"{name}.self.{part}" for part in names], heads)
      for key, names in zip(keys, parts, strict=True)
    }
    if "q" in inputs:  # of one matrix
      inputs["q"] = {k: v.squeeze(v.ndim - 3) for k, v in inputs["q"].items()}
    return {**inputs, "out": _out(get, f"{name}.output.dense", heads)}

  def layer(i: int) -> dict[str, Any]:
    name = f"bert.encoder.layer.{i}"
    found = {
      "self_attention": attention(
        f"{name}.attention", [["query", "key", "value"]], ["qkv"]
      ),
      "self_norm": _norm(get, f"{name}.attention.output.LayerNorm"),
      "mlp": {
        "up": _dense(get, f"{name}.intermediate.dense"),
        "down": _dense(get, f"{name}.output.dense"),
      },
      "mlp_norm": _norm(get, f"{name}.output.LayerNorm"),
    }
    if cross and i >= section.text_depth:
      found |= {
        "cross_attention": attention(
          f"{name}.crossattention", [["query"], ["key", "value"]], ["q", "kv"]
        ),
        "cross_norm": _norm(get, f"{name}.crossattention.output.LayerNorm"),
      }
    return found

  layers = [layer(i) for i in range(section.depth)]
  embeddings = "bert.embeddings"
  head = "cls.predictions"
  stream = {
    "embedding": {"embedding": get(f"{embeddings}.word_embeddings.weight")},
    "pos": get(f"{embeddings}.position_embeddings.weight"),
    "norm": _norm(get, f"{embeddings}.LayerNorm"),
    "transformer": {"layers": _stacked(layers[section.text_depth :])},
  }
  if section.text_depth:
    below = layers[: section.text_depth]
    stream["text_transformer"] = {"layers": _stacked(below)}
  return {
    "stream": stream,
    "words": {
      "transform": _dense(get, f"{head}.transform.dense"),
      "norm": _norm(get, f"{head}.transform.LayerNorm"),
      "bias": get(f"{head}.bias"),
    },
  }


if __name__ == "__main__":
  command.execute(main)
