"""SCL: semantic completion.

python -m vlp_jax.main --config=configs/scl.py            minutes, on a laptop
python -m vlp_jax.main --config=configs/scl.py:debug      seconds
python -m vlp_jax.main --config=configs/scl.py:b16        the paper's recipe
python -m vlp_jax.main --config=configs/scl.py:l14        ViT-L, RoBERTa-large
python -m vlp_jax.main --config=configs/scl.py:g14        ViT-g/14, 1.6B
python -m vlp_jax.main --config=configs/scl.py:reference  the release's quirks

Half of the steps are on scenes, half on clips of scenes_video. The paper's
recipe takes clips of WebVid as well with --config.clips.share=0.5.
"""

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base(
    "scl",
    match_group=0,  # the whole batch
    mask_id=3,  # the end symbol, which hides words where there is no [MASK]
    contrast_weight=0.5,
    match_weight=1.0,
    word_weight=1.0,
    vision_weight=1.0,
    language_weight=1.0,
    patch_weight=0.0,  # 0.2 in GLSCL, as the next one
    token_weight=0.0,
    image_mask_ratio=0.8,
    text_mask_ratio=0.4,
    patch_mask_ratio=0.3,
    word_ratio=0.15,
    completion_temperature=0.03,
    negatives="random",
    contrastive_grad_scale=1.0,
    same_image=True,
    word_pool="words",
    text_mask="exact",
    keep_temperature=True,
    itc_chunk=0,
    word_chunk=0,
  )
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14, g14=g14)
  sizes |= dict(reference=reference)
  choose(size, sizes)(config)
  return config


def tiny(config):
  presets.two_streams_tiny(config)


def debug(config):
  tiny(config)
  presets.debug(config)
  config.clips.name = "scenes_video/debug"


def b16(config):
  """The release's recipe: 100,000 steps on COCO, VG, SBU and CC3M."""
  presets.two_streams_at_scale(config)


def l14(config):
  b16(config)
  presets.enlarge_fused(config, "l14")


def g14(config):
  b16(config)
  presets.enlarge_fused(config, "g14")


def reference(config):
  """`b16` as the release computes it; methods/scl.py says what that is."""
  b16(config)
  config.method.update(
    contrastive_grad_scale=1 / 8,
    same_image=False,
    word_pool="padded",
    text_mask="replacement",
    keep_temperature=False,
  )
  config.optimizer.decay_also = ("tokens", "temperature")
