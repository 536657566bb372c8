"""open_clip's CoCa at the sizes of a config, for parity and for speed.

Imports nothing of open_clip or PyTorch until it is asked to.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.ops import patches


def load():
  """Imports open_clip.

  open_clip needs torchvision, of which some places have no build for a CPU:
  the GPU build's compiled part does not load, and its Python part then looks
  for operators in vain. open_clip's CoCa uses none; so they are declared.

  Raises:
    ImportError: if open_clip or torchvision is not installed.
  """
  import torch

  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
      del sys.modules[name]
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for operator in ("nms", "qnms"):
      torch.library.define(f"torchvision::{operator}", arguments)
  import open_clip

  return open_clip


def available(*more: str) -> bool:
  """Tells whether open_clip and other modules can be imported; says if not."""
  try:
    load()
    for name in more:
      importlib.import_module(name)
  except ImportError as error:
    print(f"without the peer: {error}", file=sys.stderr)
    return False
  return True


def compiles(device: str) -> bool:
  """Tells whether `torch.compile` works for a device; says if not."""
  import torch

  try:
    torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
  except Exception as error:  # of various types: without a C++ compiler, ...
    reason = str(error).strip().splitlines()[0]
    print(f"without torch.compile: {reason}", file=sys.stderr)
    return False
  return True


def build(config: ConfigDict):
  """Makes open_clip's CoCa with the sizes of `config.model`.

  Activations, norms and blocks are open_clip's, whatever the config says. A
  pooler other than `openclip` becomes `coca_base`'s arrangement, without one.
  The vocabulary head, which open_clip leaves uninitialised, starts as its
  text projection does.
  """
  open_clip = load()
  import torch

  model, tokenizer = config.model, config.tokenizer
  vision, text, decoder = model.vision, model.text, model.decoder
  language = dict(context_length=text.max_len, vocab_size=tokenizer.vocab_size)
  coca = open_clip.CoCa(
    embed_dim=model.embed_dim,
    vision_cfg=dict(
      image_size=config.data.image_size,
      patch_size=vision.patch_size,
      width=vision.width,
      layers=vision.depth,
      head_width=vision.width // vision.num_heads,
      attentional_pool=model.pooler.kind == "openclip",
      attn_pooler_queries=model.pooler.num_queries,
      attn_pooler_heads=model.pooler.num_heads,
      output_tokens=True,
    ),
    text_cfg=dict(
      width=text.width,
      layers=text.depth,
      heads=text.num_heads,
      embed_cls=True,
      output_tokens=True,
      **language,
    ),
    multimodal_cfg=dict(
      width=decoder.width,
      layers=decoder.depth,
      heads=decoder.num_heads,
      **language,
    ),
  )
  with torch.no_grad():
    torch.nn.init.normal_(
      coca.text_decoder.text_projection, std=decoder.width**-0.5
    )
  return coca


def pixels(image: np.ndarray):
  """What open_clip's transforms make of uint8 `[B, H, W, 3]`."""
  import torch

  scaled = image.astype(np.float32) / 255
  mean, std = (np.array(x, np.float32) for x in (patches.MEAN, patches.STD))
  return torch.from_numpy(((scaled - mean) / std).transpose(0, 3, 1, 2).copy())
