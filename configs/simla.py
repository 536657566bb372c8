"""SIMLA: single-stream multi-level alignment.

python -m vlp_jax.main --config=configs/simla.py            minutes, on a laptop
python -m vlp_jax.main --config=configs/simla.py:debug      seconds
python -m vlp_jax.main --config=configs/simla.py:b16        the paper's recipe
python -m vlp_jax.main --config=configs/simla.py:l14        ViT-L/14, BERT-large
python -m vlp_jax.main --config=configs/simla.py:g14        ViT-g/14, 1.8B
python -m vlp_jax.main --config=configs/simla.py:reference  the release's quirks
"""

from vlp_jax import presets
from vlp_jax.config import choose


def get_config(size: str = "tiny"):
  config = presets.base("simla")
  presets.fusion(config)
  config.method.update(
    word_weight=1.0,
    patch_weight=1.0,
    keyword_weight=1.0,
    visual_tokenizer="patches",  # or "dalle", or "pixels"
    visual_vocab_size=512,
    visual_weights="",
    mask_patches=19,
    mask_block=4,
    mlm_axis="vocabulary",
    keyword_specials=False,
    num_keywords=4,
    keyword_feature="embedding",  # or "cls", as the paper has it
    keyword_image="teacher",
    patch_text="teacher",
    stop_ids=(),
  )
  sizes = dict(tiny=tiny, debug=debug, b16=b16, l14=l14, g14=g14)
  sizes |= dict(reference=reference)
  choose(size, sizes)(config)
  return config


def tiny(config):
  presets.fusion_tiny(config)
  config.total_steps = 1400
  config.evals.keywords_test = presets.evaluation("keywords", "test")


def debug(config):
  tiny(config)
  presets.debug(config)
  config.method.visual_vocab_size = 32


def b16(config):
  """Khan et al. 2022, sections 2.5 and 3.1: 4M pictures, 30 epochs."""
  presets.fusion_at_scale(config)
  config.method.update(
    visual_tokenizer="dalle",
    visual_vocab_size=8192,
    visual_weights="dalle_encoder.npz",
    mask_patches=75,
    mask_block=16,
    grounding_layer=8,
  )


def l14(config):
  b16(config)
  presets.enlarge_fused(config, "l14")


def g14(config):
  b16(config)
  presets.enlarge_fused(config, "g14")


def reference(config):
  """`b16` as the release computes it; methods/simla.py says what that is."""
  b16(config)
  config.method.update(
    match_group=64,
    same_image=False,
    teacher_dropout=True,
    mlm_axis="sequence",
    keyword_specials=True,
    num_keywords=5,
    keyword_image="student",
    patch_text="student",
  )
  config.schedule.stairs = 30  # its learning rate changes with the epoch
  config.optimizer.decay_also = ("tokens", "temperature")
