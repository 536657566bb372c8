"""ALBEF: align before fuse.

python -m vlp_jax.main --config=configs/albef.py         minutes, on a laptop
python -m vlp_jax.main --config=configs/albef.py:debug   seconds
python -m vlp_jax.main --config=configs/albef.py:b16     the paper's recipe
python -m vlp_jax.main --config=configs/albef.py:l14     ViT-L/14, BERT-large
python -m vlp_jax.main --config=configs/albef.py:g14     ViT-g/14, 1.7B
"""

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base("albef")
  presets.fusion(config)
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14, g14=g14)
  choose(size, sizes)(config)
  return config


def tiny(config):
  presets.fusion_tiny(config)
  # One layer for text alone, two that look at pictures.
  config.model.stream.text_depth = 1
  config.total_steps = 2800


def debug(config):
  tiny(config)
  presets.debug(config)


def b16(config):
  """Li et al. 2021, section 3.5: 30 epochs at 512, 6 + 6 layers."""
  presets.fusion_at_scale(config)
  config.model.stream.text_depth = 6
  config.method.grounding_layer = 2  # the ninth of twelve layers


def l14(config):
  b16(config)
  presets.enlarge_fused(config, "l14")


def g14(config):
  b16(config)
  presets.enlarge_fused(config, "g14")
