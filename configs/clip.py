"""CLIP (and SigLIP with --config.method.loss=sigmoid).

python -m vlp_jax.main --config=configs/clip.py         minutes, on a laptop
python -m vlp_jax.main --config=configs/clip.py:debug   seconds
python -m vlp_jax.main --config=configs/clip.py:b16     ViT-B/16, CC12M
python -m vlp_jax.main --config=configs/clip.py:l14     ViT-L/14, 32,768 a step
python -m vlp_jax.main --config=configs/clip.py:g14     ViT-g/14, 1.4B
"""

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base(
    "clip", loss="softmax", itc_reduction="mean", itc_chunk=0
  )
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14, g14=g14)
  choose(size, sizes)(config)
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


def l14(config):
  """Radford et al. 2021, tables 18 to 20: batch, and learning rate."""
  b16(config)
  presets.enlarge(config, "l14")
  config.batch_size = 32_768
  config.method.itc_chunk = 128
  config.optimizer.learning_rate = 4e-4


def g14(config):
  l14(config)
  presets.enlarge(config, "g14")
