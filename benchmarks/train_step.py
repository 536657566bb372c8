"""How fast is a train step? CoCa beside open_clip's, and what SyCoCa costs.

  python -m benchmarks.train_step                        about ten minutes
  python -m benchmarks.train_step --rounds=2 --steps=3   does it run at all
  python -m benchmarks.train_step --size=s16 --batch_size=16 --steps=2
  python -m benchmarks.train_step --device=cuda --dtype=bfloat16 --size=l14

A step is forward, backward, clipping to a norm of 1 and AdamW, on one batch
that lies in the device's memory; in float32, or with products in bfloat16 (by
autocast in open_clip); on GPUs, products in float32 are TF32 in both. Sizes are
`tiny`, `b16` and `l14` of `configs/coca.py`, or ViT-S/16's at 224 pixels
(`s16`); but for `tiny`, open_clip's and `coca_base` alone are compared. GFLOP
are a step's model operations (`vlp_jax/flops.py`), utilisation in bfloat16
their share of the device's peak, where that is known.

The contenders:

  open_clip          its CoCa and losses, eager as it trains by default, with
                     PyTorch's fused AdamW, on threads for all cores
  open_clip_huge     the same in huge pages of memory, which it does not ask
                     for; on CPUs
  open_clip_compiled the same by torch.compile, where that works
  coca_base          ours with the same operations: [CLS], GELU, two MLPs a
                     decoder layer; on one JAX device with threads, the default.
                     `b16` and `l14` are so by themselves
  coca_base_devices  the same with a JAX device a core, the batch cut by device
  coca               configs/coca.py as it is
  sycoca_tokens      configs/sycoca.py, mask_stage=tokens
  sycoca_input       configs/sycoca.py, mask_stage=input

Ours have huge pages and keep them, as `vlp_jax.main` sees to
(`vlp_jax/step_memory.py`).
Each has a process of its own, which waits while another one works; they take
turns, round by round, and a step that does not count goes before each turn's
(after a rest, memory that a step gave back is slow to come again on some
virtual machines). The table gives medians over rounds. A ratio is taken within
each round and given as median [least, greatest]. One line of JSON is added to
`--output`.

open_clip needs the [parity] extra (docs/parity.md); without it its row and
ratio are left out. A result means something on a machine that does nothing
else. Run it from the top of the tree.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics

from benchmarks import open_clip_peer, rounds
from vlp_jax import step_memory

SAME = (  # as open_clip's `coca_base`
  "model.activation=gelu",
  "model.vision.cls_token=true",
  "model.vision.stem=linear",
  "model.vision.positions=learned",
  "model.pooler.kind=cls",
  "model.text.pool=cls",
  "model.decoder.cross_mlp=true",
)
# ViT-S/16 (Steiner et al. 2021), and a text tower and a decoder as wide.
S16 = (
  "data.image_size=224",
  "model.vision.patch_size=16",
  *(f"model.{name}.width=384" for name in ("vision", "text", "decoder")),
  *(f"model.{name}.num_heads=6" for name in ("vision", "text", "decoder")),
  *("model.vision.depth=12", "model.text.depth=6", "model.decoder.depth=6"),
  *("model.pooler.width=384", "model.pooler.num_heads=6"),
  *("model.embed_dim=384", "model.text.max_len=76", "tokenizer.max_len=76"),
  *("tokenizer.vocab_size=32000", "cpu_optimization_level=3"),
)
# What saves memory that is there, at a price.
ROOMY = ("model.remat=dots", "method.caption_chunk=0", "method.itc_chunk=0")
# Size: config of `coca_base`, and overrides.
SIZES = {
  "tiny": ("configs/coca.py", SAME),
  "s16": ("configs/coca.py", (*SAME, *S16)),
  "b16": ("configs/coca.py:b16", ROOMY),
  "l14": ("configs/coca.py:l14", ROOMY),
}
# Name: config, overrides. Those of `coca_base` follow from the size.
OURS = {
  "coca": ("configs/coca.py", ()),
  "sycoca_tokens": ("configs/sycoca.py", ("method.mask_stage=tokens",)),
  "sycoca_input": ("configs/sycoca.py", ("method.mask_stage=input",)),
}
BASE, BASE_DEVICES = "coca_base", "coca_base_devices"
PEERS = ("open_clip", "open_clip_huge", "open_clip_compiled")
PEER, PEER_HUGE, PEER_COMPILED = PEERS
# Name: numerator and denominator, in seconds a step; what is aimed at.
RATIOS = {
  "open_clip / coca_base": (PEER, "coca_base", ""),
  "open_clip_huge / coca_base": (PEER_HUGE, "coca_base", ""),
  "open_clip_compiled / coca_base": (PEER_COMPILED, "coca_base", ""),
  "coca_base_devices / coca_base": ("coca_base_devices", "coca_base", ""),
  "sycoca_tokens / coca": ("sycoca_tokens", "coca", "<= 1.5"),
  "sycoca_input / coca": ("sycoca_input", "coca", "<= 1.7"),
}
DEVICES = ("cpu", "cuda")  # as JAX and PyTorch both call them
DTYPES = ("float32", "bfloat16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "open_clip_torch")


def main() -> None:
  options = parse()
  if options.worker:
    config = load_config(options.worker, options)
    if options.worker in PEERS:
      compiled = options.worker == PEER_COMPILED
      facts, run = make_peer(config, options.device, compiled)
    else:
      each = options.worker == BASE_DEVICES
      facts, run = make_ours(config, rounds.cores() if each else 1)
    run(3)
    rounds.serve(facts, run)
    return
  begin = functools.partial(start, options.device)
  names = contenders(options)
  facts, seconds = rounds.compare(names, begin, options.rounds, options.steps)
  record = summarize(options, facts, seconds)
  show(record)
  rounds.keep(record, options.output)


def contenders(options: argparse.Namespace) -> list[str]:
  """Those that are compared, as far as they work here."""
  on_cpu = options.device == "cpu"
  ours = [BASE]
  if options.size == "tiny":
    ours += [*([BASE_DEVICES] if on_cpu else []), *OURS]
  if not open_clip_peer.available():
    return ours
  compiled = open_clip_peer.compiles(options.device)
  huge = [PEER_HUGE] if on_cpu else []
  return [PEER, *huge, *([PEER_COMPILED] if compiled else []), *ours]


def start(device: str, name: str) -> rounds.Worker:
  environ = {**os.environ, "JAX_PLATFORMS": device}
  if device == "cuda":  # all contenders' states are there at once
    environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  elif name not in (PEER, PEER_COMPILED):
    environ = step_memory.environment(environ) or environ
  return rounds.Worker(__spec__.name, name, environ)


def parse() -> argparse.Namespace:
  parser = rounds.parser("train_step", __doc__)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--steps", type=int, default=20, help="a round")
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--size", choices=SIZES, default="tiny")
  parser.add_argument("--device", choices=DEVICES, default="cpu")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  return parser.parse_args()


def load_config(name: str, options: argparse.Namespace, *more: str):
  """Loads the config of a contender, with more overrides.

  open_clip's is that of `coca_base`.
  """
  from vlp_jax import config as config_lib

  file, overrides = OURS.get(name, SIZES[options.size])
  common = (
    f"batch_size={options.batch_size}",
    f"model.dtype={options.dtype}",
    *("accumulate=1", "optimizer.name=adamw"),
  )
  return config_lib.load(file, (*common, *overrides, *more))


def make_batch(config) -> dict:
  """A random batch; captions of scenes fill most of their places."""
  import numpy as np

  draw = np.random.default_rng(0)
  size, length = config.data.image_size, config.tokenizer.max_len
  batch, vocabulary = config.batch_size, config.tokenizer.vocab_size
  text_len = draw.integers(length // 2, length + 1, batch).astype(np.int32)
  text = draw.integers(4, vocabulary, (batch, length)).astype(np.int32)
  text[np.arange(length) >= text_len[:, None]] = 0
  return dict(
    image=draw.integers(0, 256, (batch, size, size, 3), dtype=np.uint8),
    text=text,
    text_len=text_len,
    image_id=np.arange(batch, dtype=np.int32),
  )


def make_ours(config, devices: int):
  """Returns facts of the compiled step, and what runs so many steps."""
  import jax

  jax.config.update("jax_num_cpu_devices", devices)
  step_memory.stay_in_main_thread()

  from vlp_jax import chips, flops, optim, sharding, train_state, train_step
  from vlp_jax import config as config_lib
  from vlp_jax.methods import base

  config_lib.validate(config, devices)
  method = base.get(config.method.name, config)
  used = jax.devices()[:devices]
  mesh = sharding.make_mesh(config_lib.mesh_shape(config, devices), used)
  optimizer, _ = optim.make_optimizer(config, config.total_steps, 80)

  def create():
    return train_state.of_config(config, method, optimizer)

  shardings = sharding.shardings_for(jax.eval_shape(create), mesh)
  state = jax.jit(create, out_shardings=shardings)()
  batch = sharding.put_batch(make_batch(config), mesh)
  step = train_step.jit_step(config, method, optimizer, mesh, shardings)
  compiled = step.lower(state, batch).compile()

  def run(steps: int) -> None:
    nonlocal state
    metrics = {}
    for _ in range(steps):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))

  # Peaks are those of bfloat16.
  half = config.model.dtype == "bfloat16"
  chip = chips.get(used[0].device_kind) if half else None
  return dict(
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    gflop=flops.model_flops(method, batch) / 1e9,
    peak_gflop=chip and chip.flops * devices / 1e9,
  ), run


def make_peer(config, device: str = "cpu", compiled: bool = False):
  """The same of open_clip's CoCa, at the sizes of a config."""
  import torch

  torch.set_num_threads(rounds.cores())
  if device == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
  half = config.model.dtype == "bfloat16"
  model = open_clip_peer.build(config).train().to(device)
  weights = config.method
  loss = open_clip_peer.load().CoCaLoss(
    caption_loss_weight=weights.caption_weight,
    clip_loss_weight=weights.itc_weight,
  )
  matrices = [p for p in model.parameters() if p.ndim >= 2]
  others = [p for p in model.parameters() if p.ndim < 2]
  c = config.optimizer
  optimizer = torch.optim.AdamW(
    [
      dict(params=matrices, weight_decay=c.weight_decay),
      dict(params=others, weight_decay=0.0),
    ],
    lr=c.learning_rate,
    betas=(c.b1, c.b2),
    eps=c.eps,
    fused=True,
  )
  batch = make_batch(config)
  forward = torch.compile(model) if compiled else model
  image = open_clip_peer.pixels(batch["image"]).to(device)
  text = torch.from_numpy(batch["text"]).long().to(device)

  def run(steps: int) -> None:
    for _ in range(steps):
      optimizer.zero_grad()
      with torch.autocast(device, torch.bfloat16, enabled=half):
        losses = loss(**forward(image, text))
      sum(losses).backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
      optimizer.step()
      with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    if device == "cuda":
      torch.cuda.synchronize()

  parameters = sum(p.numel() for p in model.parameters())
  return dict(parameters=parameters, gflop=None), run


# --- The report -------------------------------------------------------------


def summarize(options, facts: dict, seconds: dict) -> dict:
  """Makes the record that is shown and kept."""
  # What open_clip's does is what `coca_base` does.
  work = {name: facts[BASE if name in PEERS else name] for name in facts}
  rows = {
    name: dict(
      facts[name],
      utilisation=utilisation(work[name], statistics.median(times)),
      ms_per_step=1e3 * statistics.median(times),
      examples_per_s=options.batch_size / statistics.median(times),
      rounds_ms=[round(1e3 * t, 3) for t in times],
    )
    for name, times in seconds.items()
  }
  return rounds.record(
    "train_step",
    PACKAGES,
    dict(
      rounds=options.rounds,
      steps=options.steps,
      batch_size=options.batch_size,
      size=options.size,
      device=options.device,
      dtype=options.dtype,
      rows=rows,
      ratios=rounds.ratios(RATIOS, seconds),
    ),
  )


def utilisation(work: dict, seconds: float) -> float | None:
  """Share of a device's peak; None where nobody has told that."""
  peak = work["peak_gflop"]
  return peak and work["gflop"] / (seconds * peak)


def show(record: dict) -> None:
  rounds.show_machine(record["machine"])
  print(
    f"{record['size']} in {record['dtype']} on {record['device']}, batch of "
    f"{record['batch_size']}, {record['rounds']} rounds of {record['steps']} "
    "steps\n"
  )
  print(
    f"{'':20}{'parameters':>12}{'GFLOP':>8}{'ms/step':>10}{'examples/s':>12}"
    f"{'utilisation':>13}"
  )
  for name, row in record["rows"].items():
    gflop = f"{row['gflop']:.1f}" if row["gflop"] else "-"
    print(
      f"{name:20}{row['parameters']:>12,}{gflop:>8}"
      f"{row['ms_per_step']:>10.1f}{row['examples_per_s']:>12.0f}"
      + (f"{row['utilisation']:>13.1%}" if row["utilisation"] else "")
    )
  print("\ntime of a step, by round")
  rounds.show_ratios(record["ratios"])


if __name__ == "__main__":
  main()
