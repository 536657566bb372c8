"""Pieces that several files in `configs/` start from."""

import json

from ml_collections import ConfigDict

from vlp_jax.config import default_config


def base(method: str, **options) -> ConfigDict:
  """The common fields, with the name and the options of a method."""
  config = default_config()
  config.method = ConfigDict(dict(name=method, **options))
  return config


def tower(width: int, depth: int, num_heads: int, **more) -> dict:
  """A stack's section."""
  return dict(
    width=width, depth=depth, num_heads=num_heads, mlp_ratio=4.0, **more
  )


def tiny(config: ConfigDict) -> None:
  """Minutes on two cores, on the embedded scenes."""
  config.batch_size = 64
  config.total_steps = 1200
  config.cpu_optimization_level = 1
  config.tokenizer.update(vocab_size=192, max_len=28)
  config.model = ConfigDict(
    dict(
      embed_dim=96,
      activation="relu2",
      scan=False,  # three layers compile fast either way; unrolled runs faster
      remat="none",
      dtype="auto",
      attention="auto",  # or xla, or a kernel, of ops/attention.py
      vision=tower(
        96,
        3,
        2,
        patch_size=8,
        cls_token=False,
        stem="hmlp",
        positions="sincos",
        pre_norm=True,
      ),
      # [CLS] does as well here; [EOT] saves a token.
      text=tower(96, 1, 2, max_len=28, pool="eot", legacy_cls_mask=False),
      pooler=dict(kind="attention", width=96, num_queries=0, num_heads=2),
    )
  )
  config.optimizer.update(
    name="muon",
    learning_rate=1.2e-3,
    muon_learning_rate=0.0065,
    weight_decay=0.05,
  )
  config.schedule.update(warmup_steps=80, end_factor=0.02)
  config.checkpoint.update(every_steps=500, best_metric="val/retrieval/i2t_r1")
  config.log.every_steps = 10
  config.evals = scenes_evals(captions=False)


def debug(config: ConfigDict) -> None:
  """Seconds, on a few scenes; run after `tiny`, and it learns nothing."""
  config.data.name = "scenes/debug"
  config.model.scan = True  # compiles fast
  config.batch_size = 16
  config.total_steps = 8
  config.schedule.warmup_steps = 2
  config.checkpoint.every_steps = 4
  config.log.every_steps = 2
  config.optimizer.max_spike = 100.0
  for evaluation in config.evals.values():
    evaluation.update(batch_size=32, max_examples=32)
    evaluation.every_steps = min(evaluation.every_steps, 4)
    if "k" in evaluation:
      evaluation.k = 4


# The fields that evaluators have beside the common ones, here to be overridden.
EVAL_FIELDS = {
  "retrieval": dict(captions="first"),
  "reranking": dict(captions="first", k=16),
  "zeroshot": dict(classes=(), templates=()),
  "pointing": dict(readout=""),
  "grounding": dict(readout="", proposals=""),
  "captioning": dict(max_len=0),
  "keywords": dict(examples=4),
}


def scenes_evals(captions: bool, matching: bool = False) -> ConfigDict:
  """What is measured on scenes.

  Args:
    captions: for methods that write them.
    matching: for methods that score pairs of picture and text, and whose
      words attend to patches.
  """
  evals = dict(
    # Watched while training; everything is chosen on validation.
    validation=evaluation(
      "retrieval", "validation", every_steps=500, prefix="val"
    )
  )
  kinds = ["retrieval", "zeroshot", "pointing", "binding", "relation"]
  if captions:
    kinds.append("captioning")
  if matching:
    kinds += ["reranking", "alignment"]
  for prefix, split in (("eval", "test"), ("eval_comp", "comp")):
    for kind in kinds:
      evals[f"{kind}_{split}"] = evaluation(kind, split, prefix=prefix)
  return ConfigDict(evals)


def evaluation(kind: str, split: str, **fields) -> dict:
  """An evaluation with all its fields, by default at the end of a run."""
  common = dict(
    type=kind,
    split=split,
    clips=False,
    every_steps=0,
    prefix="eval",
    batch_size=128,
    max_examples=0,
    use_ema=False,
  )
  return common | EVAL_FIELDS.get(kind, {}) | fields


def fusion(config: ConfigDict) -> None:
  """What ALBEF and SIMLA have in common; the values are their releases'."""
  config.ema.decay = 0.995
  config.method.update(
    match_group=0,  # the whole batch
    mask_id=3,  # the end symbol, which has no other place in these texts
    mask_ratio=0.15,
    alpha=0.4,
    alpha_ramp_steps=10_000,
    queue_size=65_536,  # 0 = none
    same_image=True,
    teacher_dropout=False,
    itc_chunk=0,
    word_chunk=0,
    grounding_layer=0,
  )


def _matching_tiny(config: ConfigDict) -> None:
  """`tiny` for methods with matching: half the batch, and its rates."""
  tiny(config)
  vision = config.model.vision
  del vision.cls_token, vision.pre_norm, config.model.pooler
  config.batch_size = 32
  config.optimizer.update(learning_rate=8.5e-4, muon_learning_rate=0.0045)
  # A step of the others' size is a tenth of the temperature.
  config.optimizer.multipliers = '{"temperature": 0.3}'
  config.evals = scenes_evals(captions=False, matching=True)


def fusion_tiny(config: ConfigDict) -> None:
  """`tiny` for a vision tower and a single-stream encoder."""
  _matching_tiny(config)
  del config.model.text
  config.model.start = ""  # an .npz file of `vlp_jax.convert.albef`
  config.model.init = "clip"  # N(0, 0.02^2) is made for a width of 768
  config.model.stream = ConfigDict(
    tower(96, 3, 2, text_depth=0, max_len=65, dropout=0.0)
  )
  config.ema.decay = 0.98  # of 50 steps: a short run cannot wait for 200
  # The batch alone is contrasted: while all embeddings still move fast, those
  # of a queue are told from fresh ones by their age, not by what they show.
  config.method.update(alpha_ramp_steps=300, queue_size=0, grounding_layer=1)


def fusion_at_scale(config: ConfigDict) -> None:
  """The recipe of ALBEF's and SIMLA's releases, ViT-B/16 and BERT-base."""
  at_scale(config, image_size=256, patch_size=16)
  # COCO, Visual Genome, CC3M and SBU: 5.1M pairs, each as often as any other.
  config.data.update(
    mix=json.dumps(
      dict(coco_captions=0.57, visual_genome=0.77, cc3m=2.95, sbu=0.86)
    ),
    augment="randaugment",
    crop_scale=(0.2, 1.0),
    flip=0.5,
    eval_resize="stretch",
    clean_captions=True,
    max_words=30,
  )
  config.batch_size = 512
  config.total_epochs = 30.0
  # 25 tokens, and the end symbol, which is dropped.
  config.tokenizer.update(path="vocab.txt", vocab_size=30_522, max_len=26)
  config.method.mask_id = 103
  config.method.word_chunk = 16
  model = config.model
  model.embed_dim = 256
  del model.vision.cls_token, model.vision.pre_norm, model.text, model.pooler
  model.start = ""  # DeiT and BERT, by `vlp_jax.convert.albef`
  model.init = "bert"
  model.stream = ConfigDict(
    tower(768, 12, 12, text_depth=0, max_len=512, dropout=0.1)
  )
  config.optimizer.update(
    learning_rate=1e-4, weight_decay=0.02, b2=0.999, eps=1e-8, grad_clip=0.0
  )
  config.schedule.update(warmup_steps=2000, start_factor=0.1, end_factor=0.1)


def two_streams_tiny(config: ConfigDict) -> None:
  """`tiny` for a vision tower, a text tower and two streams."""
  _matching_tiny(config)
  model = config.model
  model.vision.update(activation="relu2", frames=16, frame_fill="zero")
  model.text = ConfigDict(tower(96, 2, 2, max_len=28, dropout=0.0))
  model.fusion = ConfigDict(tower(96, 2, 2, dropout=0.0))
  model.init = "clip"
  model.start = ""  # an .npz file of `vlp_jax.convert.scl`
  # Half of the steps are on clips; such a step costs what one on pictures does.
  config.clips.update(
    share=0.5, name="scenes_video", image_size=48, batch_size=16
  )
  for kind in ("retrieval", "reranking", "motion", "binding"):
    config.evals[f"{kind}_clips"] = evaluation(
      kind, "test", clips=True, prefix="eval_clips"
    )


def two_streams_at_scale(config: ConfigDict) -> None:
  """The recipe of SCL's release, CLIP ViT-B/16 and RoBERTa-base."""
  at_scale(config, image_size=288, patch_size=16)
  config.data.update(
    mix=json.dumps(
      dict(coco_captions=0.57, visual_genome=5.4, cc3m=2.95, sbu=0.86)
    ),
    crop_scale=(0.8, 1.0),
    flip=0.5,
    eval_resize="stretch",
  )
  # A run is on pictures or, with `clips.share`, on clips as well, of which a
  # batch has half as many.
  config.clips.update(
    name="webvid", num_frames=4, image_size=224, batch_size=2048
  )
  # In chunks, for up to 16 chips; CL and completion contrast the whole batch.
  config.batch_size = 4096
  config.accumulate = 8
  config.method.match_group = 16
  config.total_epochs = 0.0
  config.total_steps = 100_000
  config.tokenizer.update(path="tokenizer.json", vocab_size=50_265, max_len=50)
  config.method.mask_id = 50_264
  config.method.word_chunk = 4
  model = config.model
  del model.vision.cls_token, model.vision.pre_norm, model.pooler
  # CLIP's last layer of twelve is left out.
  model.vision.update(
    depth=11, activation="quick_gelu", frames=8, frame_fill="zero"
  )
  model.text = ConfigDict(tower(768, 12, 12, max_len=512, dropout=0.1))
  model.fusion = ConfigDict(tower(768, 6, 12, dropout=0.1))
  model.init = "bert"
  model.start = ""
  config.optimizer.update(
    learning_rate=2e-5, weight_decay=0.01, b2=0.98, eps=1e-8, grad_clip=0.0
  )
  names = ("image_in", "text_in", "fusion", "words", "vocabulary", "matching")
  multipliers = dict.fromkeys(names, 5) | {"types": 1 / 5}  # once, in fusion
  config.optimizer.multipliers = json.dumps(multipliers)
  config.schedule.update(name="linear", warmup_steps=10_000)


# Width, depth, heads and the MLP's width of vision towers (Dosovitskiy et al.
# 2021, table 1; Zhai et al. 2022, table 2), and of the text towers beside them:
# those of open_clip's ViT-L-14 and ViT-g-14.
VISION = dict(l14=(1024, 24, 16, 4096), g14=(1408, 40, 16, 6144))
TEXT = dict(l14=(768, 12, 12, 3072), g14=(1024, 24, 16, 4096))
BERT_LARGE = (1024, 24, 16, 4096)


def _resize(
  tower: ConfigDict, width: int, depth: int, heads: int, mlp: int
) -> None:
  tower.update(width=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width)


def enlarge(config: ConfigDict, size: str) -> None:
  """Makes a `b16` of two towers one of ViT-L/14 or ViT-g/14, at 224 pixels."""
  model = config.model
  config.data.image_size = 224
  model.vision.patch_size = 14
  _resize(model.vision, *VISION[size])
  for name in ("text", "decoder"):
    if name in model:
      _resize(model[name], *TEXT[size])
  model.embed_dim = model.text.width
  model.pooler.update(
    width=model.vision.width, num_heads=model.vision.num_heads
  )


def enlarge_fused(config: ConfigDict, size: str) -> None:
  """The same for towers that are fused; text layers are BERT-large's.

  Those that patches go through as well are as wide as the vision tower.
  """
  model = config.model
  config.data.image_size = 224
  model.vision.patch_size = 14
  left_out = 12 - model.vision.depth  # SCL leaves CLIP's last layer out
  _resize(model.vision, *VISION[size])
  model.vision.depth -= left_out
  width, depth, heads, mlp = BERT_LARGE
  if "stream" in model:
    width = model.vision.width
    _resize(model.stream, width, depth, heads, 4 * width)
    # The same share of the layers as in `b16`.
    model.stream.text_depth *= 2
    config.method.grounding_layer *= 2
  else:
    _resize(model.text, width, depth, heads, mlp)
    _resize(model.fusion, width, model.fusion.depth, heads, mlp)


def at_scale(config: ConfigDict, *, image_size: int, patch_size: int) -> None:
  """What the papers' sizes share: CC12M, 20 epochs at 2,048, AdamW.

  The optimizer's values are open_clip's for ViTs, which SyCoCa builds on.
  """
  config.data.update(name="cc12m", image_size=image_size, augment="crop")
  config.batch_size = 2048
  config.total_epochs = 20.0
  config.tokenizer.update(vocab_size=64_000, max_len=76)
  config.model = ConfigDict(
    dict(
      embed_dim=512,
      activation="gelu",
      scan=True,
      remat="full",
      dtype="auto",
      attention="auto",
      vision=tower(
        768,
        12,
        12,
        patch_size=patch_size,
        cls_token=True,
        stem="linear",
        positions="learned",
        pre_norm=True,
      ),
      text=tower(768, 12, 12, max_len=76, pool="cls", legacy_cls_mask=False),
      pooler=dict(kind="cls", width=768, num_queries=0, num_heads=12),
    )
  )
  config.optimizer.update(
    name="adamw",
    learning_rate=5e-4,
    weight_decay=0.2,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    grad_clip=1.0,
  )
  config.schedule.update(warmup_steps=10_000)
  config.checkpoint.update(every_steps=5000, keep=3)
  config.log.every_steps = 100
  config.evals = ConfigDict(
    dict(
      validation=evaluation(
        "retrieval",
        "validation",
        every_steps=5000,
        prefix="val",
        batch_size=1024,
        max_examples=5000,
      )
    )
  )
