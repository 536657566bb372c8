"""The fields that every config has."""

from ml_collections import ConfigDict, config_dict


def default_config() -> ConfigDict:
  """Returns the fields that every config has, with their defaults.

  A config file starts from this and fills `model`, `method` and `evals`.
  """
  return ConfigDict(
    dict(
      seed=0,
      batch_size=64,
      # The length of the run, one of the three; total_steps > 0 wins.
      total_steps=0,
      total_epochs=0.0,
      total_examples=0,
      data=dict(
        name="scenes",
        source="",
        # To train on several: {"cc12m": 0.7, "coco": 0.3}, kept as JSON.
        mix=config_dict.FieldReference("", field_type=object),
        image_size=64,
        num_frames=0,  # of a clip; 0 = the data are pictures
        num_workers=0,
        image_key="",
        caption_key="",
        train_split="train",
        val_split="validation",
        test_split="test",
        augment="none",  # or "crop", or "randaugment", which crops first
        crop_scale=(0.9, 1.0),  # of the area
        flip=0.0,  # probability
        eval_resize="crop",  # or "stretch"
        clean_captions=False,
        max_words=0,  # of a cleaned caption; 0 = all
        max_bad=0.01,  # share of unreadable records that stops the run
        seed=0,
      ),
      # Joint training: a share of the steps is on clips, the others on `data`.
      clips=dict(
        share=0.0,  # of the steps
        name="",
        source="",
        num_frames=4,
        image_size=0,  # 0 = as pictures
        batch_size=0,  # 0 = as pictures
      ),
      tokenizer=dict(path="", vocab_size=512, max_len=32),
      # For runs that are older than it; the sizes say all of a model.
      model=dict(attention="auto"),
      method=dict(name=""),
      optimizer=dict(
        name="adamw",
        learning_rate=1e-3,
        muon_learning_rate=0.02,  # of the matrices, where name is muon
        weight_decay=0.05,  # of matrices and token tables
        decay_also=(),  # of "tokens" (positions, [CLS], masks), "temperature"
        # Of learning rates, by part of a parameter's path; JSON, or a dict.
        multipliers=config_dict.FieldReference("", field_type=object),
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        grad_clip=1.0,  # global norm; 0 = off
        # An update is skipped if its gradient's norm is more than so many times
        # the running mean, as it is if the gradient is not finite; 0 = off.
        max_spike=0.0,
        max_skipped=50,  # updates in a row that stop the run; 0 = off
        mu_dtype="float32",  # of the first moment
      ),
      schedule=dict(
        name="cosine",
        # Warm-up, one of the three; warmup_steps > 0 wins.
        warmup_steps=0,
        warmup_epochs=0.0,
        warmup_examples=0,
        start_factor=0.0,  # first learning rate / peak; 0 = one step's part
        end_factor=0.0,  # last learning rate / peak
        # ALBEF's way, where stairs > 0: the decay counts from the first step
        # and falls in so many stairs (epochs), the warm-up rises in these.
        stairs=0,
        warmup_stairs=20,
      ),
      ema=dict(decay=0.0),  # 0 = no average, unless the method needs one
      accumulate=1,
      # LLVM's, 0 to 3, where a step runs on a CPU: with few passes it compiles
      # sooner, and that of a small model is as fast.
      cpu_optimization_level=3,
      mesh=dict(data=-1, fsdp=1, tensor=1),  # -1 = all remaining devices
      checkpoint=dict(
        every_steps=1000,  # 0 = only at the end
        keep=2,
        best_metric="",  # keep the checkpoint where this is highest, too
      ),
      evals=dict(),
      log=dict(every_steps=50),  # 0 = only at the end
      # Steps to trace, counted from 1 when the process begins: "10:15".
      profile="",
    )
  )
