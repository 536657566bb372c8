"""SyCoCa: symmetrised contrastive captioners.

python -m vlp_jax.main --config=configs/sycoca.py         minutes, on a laptop
python -m vlp_jax.main --config=configs/sycoca.py:debug   seconds
python -m vlp_jax.main --config=configs/sycoca.py:b16     the paper's, at 224/16
python -m vlp_jax.main --config=configs/sycoca.py:l14     ViT-L/14
python -m vlp_jax.main --config=configs/sycoca.py:g14     ViT-g/14, 2.1B
python -m vlp_jax.main --config=configs/sycoca.py:b18     the paper's, at 288/18
"""

from ml_collections import ConfigDict

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base(
    "sycoca",
    itc_weight=1.0,
    caption_weight=2.0,
    tgmim_weight=1.0,
    itc_reduction="mean",
    itc_chunk=0,
    caption_chunk=0,
    score="joint",
    r_h=0.5,
    r_l=0.5,
    mask_stage="input",
    text_guided=True,
    target="normalized",
    distance="l2",
    attentive_start_step=0,
    decoders="separate",  # or one stream for both, "shared"
  )
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14, g14=g14, b18=b18)
  choose(size, sizes)(config)
  return config


def tiny(config):
  presets.tiny(config)
  config.model.decoder = ConfigDict(presets.tower(96, 1, 2, cross_mlp=False))
  config.model.image_decoder = ConfigDict(
    presets.tower(64, 1, 2, cross_mlp=False)
  )
  config.evals = presets.scenes_evals(captions=True)


def debug(config):
  tiny(config)
  presets.debug(config)


def b16(config):
  _base(config, image_size=224, patch_size=16)


def l14(config):
  b16(config)
  presets.enlarge(config, "l14")


def g14(config):
  b16(config)
  presets.enlarge(config, "g14")


def b18(config):
  _base(config, image_size=288, patch_size=18)


def _base(config, **size):
  presets.at_scale(config, **size)
  config.model.decoder = ConfigDict(presets.tower(768, 12, 12, cross_mlp=True))
  config.model.image_decoder = ConfigDict(
    presets.tower(512, 8, 16, cross_mlp=False)
  )
  config.method.caption_chunk = 19
