"""python -m vlp_jax.convert.dalle encoder.pkl encoder.npz

Turns OpenAI's DALL-E encoder into weights for SIMLA's visual tokenizer.

  encoder.pkl   as released (https://cdn.openai.com/dall-e/encoder.pkl)
  encoder.npz   what is written: arrays by the names of our own parameters

The released file is a pickle of a whole PyTorch module, and a pickle can run
anything. Here nothing of it runs: every class that the module consists of is
replaced by an empty one, a file that names any other is refused, and only the
tensors are taken. Needs PyTorch, but not OpenAI's code. A state dict of the
module, as `torch.save(module.state_dict(), path)` writes it, will do as well.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from vlp_jax import command
from vlp_jax.convert import npz
from vlp_jax.errors import UserError
from vlp_jax.flags import print_help

# Beside tensors and containers of Python, which PyTorch lets through.
CLASSES = (
  "dall_e.encoder.Encoder",
  "dall_e.encoder.EncoderBlock",
  "dall_e.utils.Conv2d",
  "torch.nn.modules.activation.ReLU",
  "torch.nn.modules.container.Sequential",
  "torch.nn.modules.linear.Identity",
  "torch.nn.modules.pooling.MaxPool2d",
)
# Their names of tensors; a block's own parts are named alike here.
_NAME = re.compile(
  r"blocks\."
  r"(?:(?P<outer>input|output\.conv)"
  r"|(?P<group>group_\d+)\.(?P<block>block_\d+)"
  r"\.(?P<part>id_path|res_path\.conv_\d))"
  r"\.(?P<kind>[wb])"
)


class _Part:
  """Stands for a class of the pickle: has attributes, and does nothing."""


def main(argv: Sequence[str]) -> None:
  """Runs the command; `argv` is without the program's name."""
  print_help(argv, __doc__)
  if len(argv) != 2 or any(argument.startswith("-") for argument in argv):
    raise UserError(
      "give two files: python -m vlp_jax.convert.dalle encoder.pkl encoder.npz"
    )
  source, target = (pathlib.Path(name).expanduser() for name in argv)
  npz.check_name(target)
  count = npz.write(target, from_dalle(read(source)))
  print(f"{count:,} parameters of DALL-E's encoder, in {target}")


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a pickled module, and runs nothing of it.

  Args:
    path: of a file that `torch.save` wrote: the module, or its state dict.

  Returns:
    float32 arrays by PyTorch's names (`blocks.input.w`).

  Raises:
    UserError: if there is no PyTorch, no file, or another class in it.
  """
  try:
    import torch
  except ImportError:
    raise UserError(
      "reading a PyTorch pickle needs PyTorch: pip install torch"
    ) from None
  allowed = [(_Part, name) for name in CLASSES]
  try:
    with torch.serialization.safe_globals(allowed):
      module = torch.load(path, map_location="cpu", weights_only=True)
    tensors = module if isinstance(module, dict) else dict(_tensors(module))
    return {name: x.detach().float().numpy() for name, x in tensors.items()}
  except OSError as error:
    raise UserError(f"cannot read {path} ({error.strerror or error})") from None
  except pickle.UnpicklingError as error:
    raise UserError(_refusal(path, str(error))) from None
  except Exception as error:  # bytes that are no pickle can fail anyhow
    kind = type(error).__name__
    raise UserError(
      f"{path} holds no PyTorch module, or not all of one ({kind})"
    ) from error


def from_dalle(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Makes parameters of a `DalleEncoder`.

  Args:
    tensors: by PyTorch's names; kernels are OIHW there, HWIO here. Sizes and
      completeness are checked where the parameters are used.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    UserError: on a name that the encoder does not have.
  """
  if not tensors:
    raise UserError("the file holds no tensors")
  params = {}
  for name, tensor in tensors.items():
    match = _NAME.fullmatch(name)
    array = np.asarray(tensor, np.float32)
    if not match or array.ndim != {"w": 4, "b": 1}[match["kind"]]:
      raise UserError(
        f"DALL-E's encoder has no tensor {name} {array.shape}; is this "
        "another file?"
      )
    path = [(match["outer"] or "").removesuffix(".conv")]
    if match["group"]:
      part = match["part"].removeprefix("res_path.")
      path = [f"{match['group']}_{match['block']}", part]
    if match["kind"] == "w":
      params[*path, "kernel"] = array.transpose(2, 3, 1, 0).copy()
    else:
      params[*path, "bias"] = array
  return traverse_util.unflatten_dict(params)


def _tensors(module: _Part, prefix: str = ""):
  """Yields names and tensors, as `named_parameters` would."""
  for name, tensor in vars(module).get("_parameters", {}).items():
    if tensor is not None:
      yield prefix + name, tensor
  for name, part in vars(module).get("_modules", {}).items():
    yield from _tensors(part, f"{prefix}{name}.")


def _refusal(path: str | os.PathLike, reason: str) -> str:
  """Says in one line why PyTorch would not read a file."""
  name = re.search(r"GLOBAL (\S+)", reason)
  if "persistent_load" in reason:
    return (
      f"{path} is a module in the format of PyTorch before 1.6, which cannot "
      "be read without running it; if you trust it, load it where OpenAI's "
      "dall_e is installed, torch.save its state_dict(), and convert that"
    )
  if not name:
    return f"{path} is no pickle of PyTorch's, or a damaged one"
  return (
    f"{path} holds {name[1]}, which is no part of DALL-E's encoder; nothing "
    "of the file was run"
  )


if __name__ == "__main__":
  command.execute(main)
