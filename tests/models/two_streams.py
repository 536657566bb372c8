"""SCL's encoder by a config: the paper's size, and one for tests."""

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.models.co_attention import CoAttention
from vlp_jax.models.heads import (
  DeepProjection,
  Temperature,
  VocabularyHead,
  WordHead,
)
from vlp_jax.models.text import BidirectionalText
from vlp_jax.models.transformer import Transformer
from vlp_jax.models.two_stream import SCLEncoder
from vlp_jax.models.vision import VisionTower


def paper(frames: int = 0) -> ConfigDict:
  """288 pixels, 50,265 words."""
  tower = dict(width=768, num_heads=12, mlp_ratio=4.0)
  return ConfigDict(
    dict(
      data=dict(image_size=288),
      tokenizer=dict(vocab_size=50_265),
      model=dict(
        embed_dim=512,
        vision=dict(tower, depth=11, patch_size=16, frames=frames),
        text=dict(tower, depth=12, max_len=512),
        fusion=dict(tower, depth=6),
      ),
    )
  )


def small(frames: int = 0) -> ConfigDict:
  """Every width another one, so that a mistaken one shows."""
  config = paper(frames)
  config.data.image_size = 12
  config.tokenizer.vocab_size = 23
  model = config.model
  model.embed_dim = 10
  model.vision.update(width=12, num_heads=3, depth=2, patch_size=4)
  model.text.update(width=8, num_heads=2, depth=3, max_len=9)
  model.fusion.update(width=16, num_heads=4, depth=2)
  return config


def build(
  config: ConfigDict, dtype: Any = jnp.float32, dropout: float = 0.0
) -> SCLEncoder:
  """The encoder of a config; `dropout` of what follows BERT."""

  def stack(name, **fields):
    tower = config.model[name]
    fields |= dict(dtype=dtype)
    if "post_norm" in fields:
      fields |= dict(dropout=dropout)
    return Transformer(
      tower.width, tower.depth, tower.num_heads, tower.mlp_ratio, **fields
    )

  vision, vocab_size = config.model.vision, config.tokenizer.vocab_size
  side = config.data.image_size // vision.patch_size
  fusion = stack("fusion", cross=True, post_norm=True, epsilon=1e-12)
  return SCLEncoder(
    vision=VisionTower(
      vision.patch_size,
      (side, side),
      stack("vision", activation="quick_gelu"),
      frames=vision.frames,
      dtype=dtype,
    ),
    text=BidirectionalText(
      vocab_size,
      config.model.text.max_len,
      stack("text", post_norm=True),
      dropout,
      dtype,
    ),
    fusion=CoAttention(fusion, dtype),
    image_projection=DeepProjection(config.model.embed_dim),
    text_projection=DeepProjection(config.model.embed_dim),
    words=WordHead(vocab_size, dtype=dtype),
    vocabulary=VocabularyHead(vocab_size, fusion.width, dtype, std=0.02),
    temperature=Temperature(),
  )
