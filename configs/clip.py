"""CLIP (and SigLIP with --config.method.loss=sigmoid).

python -m vlp_jax.main --config=configs/clip.py         minutes, on a laptop
python -m vlp_jax.main --config=configs/clip.py:debug   seconds
python -m vlp_jax.main --config=configs/clip.py:b16     ViT-B/16, CC12M
"""

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base("clip", loss="softmax", itc_reduction="mean")
  choose(size, dict(tiny=tiny, debug=debug, b16=b16))(config)
  return config


def tiny(config):
  presets.tiny(config)
  config.total_steps = 2400  # about the time of SyCoCa's 1200


def debug(config):
  tiny(config)
  presets.debug(config)


def b16(config):
  presets.at_scale(config, image_size=224, patch_size=16)
  config.model.text.pool = "eot"
