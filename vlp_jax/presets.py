"""Pieces that several files in `configs/` start from."""

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
  config.tokenizer.update(vocab_size=192, max_len=28)
  config.model = ConfigDict(
    dict(
      embed_dim=96,
      activation="relu2",
      scan=False,  # three layers compile fast either way; unrolled runs faster
      remat="none",
      dtype="auto",
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
  config.batch_size = 16
  config.total_steps = 8
  config.schedule.warmup_steps = 2
  config.checkpoint.every_steps = 4
  config.log.every_steps = 2
  for evaluation in config.evals.values():
    evaluation.max_examples = 32
    evaluation.every_steps = min(evaluation.every_steps, 4)


# The fields that evaluators have beside the common ones, here to be overridden.
EVAL_FIELDS = {
  "retrieval": dict(captions="first"),
  "zeroshot": dict(classes=(), templates=()),
  "pointing": dict(readout=""),
  "captioning": dict(max_len=0),
}


def scenes_evals(captions: bool) -> ConfigDict:
  """What is measured on scenes; `captions`: for methods that write them."""
  evals = dict(
    # Watched while training; everything is chosen on validation.
    validation=dict(
      type="retrieval", split="validation", every_steps=500, prefix="val"
    )
  )
  kinds = ["retrieval", "zeroshot", "pointing", "binding", "relation"]
  if captions:
    kinds.append("captioning")
  for prefix, split in (("eval", "test"), ("eval_comp", "comp")):
    for kind in kinds:
      evals[f"{kind}_{split}"] = dict(
        type=kind, split=split, every_steps=0, prefix=prefix
      )
  return ConfigDict(
    {
      name: dict(
        fields,
        batch_size=128,
        max_examples=0,
        use_ema=False,
        **EVAL_FIELDS.get(fields["type"], {}),
      )
      for name, fields in evals.items()
    }
  )


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
      validation=dict(
        type="retrieval",
        split="validation",
        every_steps=5000,
        prefix="val",
        batch_size=1024,
        max_examples=5000,
        use_ema=False,
        **EVAL_FIELDS["retrieval"],
      )
    )
  )
