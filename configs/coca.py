"""CoCa: contrastive captioners.

python -m vlp_jax.main --config=configs/coca.py         minutes, on a laptop
python -m vlp_jax.main --config=configs/coca.py:debug   seconds
python -m vlp_jax.main --config=configs/coca.py:b16     open_clip's Base, 224/16
python -m vlp_jax.main --config=configs/coca.py:l14     open_clip's Large
python -m vlp_jax.main --config=configs/coca.py:b18     the paper's Base, 288/18
python -m vlp_jax.main --config=configs/coca.py:l18     the paper's Large
python -m vlp_jax.main --config=configs/coca.py:g18     the paper's 2.1B
"""

from ml_collections import ConfigDict

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base(
    "coca",
    itc_weight=1.0,
    caption_weight=2.0,
    itc_reduction="mean",
    itc_chunk=0,
    caption_chunk=0,
  )
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14)
  sizes |= dict(b18=b18, l18=l18, g18=g18)
  choose(size, sizes)(config)
  return config


def tiny(config):
  presets.tiny(config)
  config.total_steps = 1800  # about the time of SyCoCa's 1200
  config.model.decoder = ConfigDict(presets.tower(96, 1, 2, cross_mlp=False))
  config.evals = presets.scenes_evals(captions=True)


def debug(config):
  tiny(config)
  presets.debug(config)


def b16(config):
  presets.at_scale(config, image_size=224, patch_size=16)
  config.model.decoder = ConfigDict(presets.tower(768, 12, 12, cross_mlp=True))
  config.method.caption_chunk = 19


def l14(config):
  """Towers of open_clip's Large, the paper's batch and optimizer."""
  b16(config)
  presets.enlarge(config, "l14")
  _paper_recipe(config)


def b18(config):
  """Yu et al. 2022, table 1 and section 4.1; 65,536 pairs a step."""
  _paper(config, width=768, depths=(12, 12, 12), heads=12, mlp=(3072, 3072))


def l18(config):
  _paper(config, width=1024, depths=(24, 12, 12), heads=16, mlp=(4096, 4096))


def g18(config):
  _paper(config, width=1408, depths=(40, 18, 18), heads=16, mlp=(6144, 5632))


def _paper(config, width, depths, heads, mlp):
  presets.at_scale(config, image_size=288, patch_size=18)
  _paper_recipe(config)
  config.tokenizer.max_len = 64
  config.method.update(itc_reduction="sum", caption_chunk=16)
  model = config.model
  model.embed_dim = width
  model.decoder = ConfigDict(presets.tower(width, 1, heads, cross_mlp=False))
  model.vision.cls_token = False
  model.text.max_len = 64
  for name, depth in zip(("vision", "text", "decoder"), depths, strict=True):
    model[name].update(
      width=width,
      depth=depth,
      num_heads=heads,
      mlp_ratio=mlp[name != "vision"] / width,
    )
  model.pooler.update(
    kind="cascade", width=width, num_queries=256, num_heads=heads
  )


def _paper_recipe(config):
  config.batch_size = 65_536
  config.method.itc_chunk = 64
  config.total_epochs = 0.0
  config.total_steps = 500_000
  config.optimizer.update(
    name="adafactor", learning_rate=8e-4, weight_decay=0.01, b1=0.9, b2=0.999
  )
  config.schedule.update(name="linear", warmup_steps=10_000)
