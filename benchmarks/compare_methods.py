"""Trains every method at `tiny`, at equal time, and makes the results table.

  python benchmarks/compare_methods.py --minutes=7 --output=runs/compare
  python benchmarks/compare_methods.py --table=matching --output=runs/matching
  python benchmarks/compare_methods.py --table=completion --output=runs/scl

The first compares captioners, the second ALBEF and SIMLA, the third SCL with
and without its completions, on pictures and clips.

One run a core, side by side, each on one device pinned to its core. Equal
time means: every row's step is timed first, under the same conditions, and
gets as many steps as fit into the minutes; its schedule has that length.
Killed and started again, it goes on: what has finished is kept, what was
under way resumes. Writes <output>/table.md, with the command of each row.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

from vlp_jax import config as config_lib

# Name of the row, config, what it changes, seeds.
CAPTIONING = (
  ("CoCa", "configs/coca.py", (), (0, 1)),
  ("SyCoCa", "configs/sycoca.py", (), (0, 1)),
  ("CLIP", "configs/clip.py", (), (0,)),
  (
    "CoCa + attentive masking of captioning",
    "configs/sycoca.py",
    ("method.tgmim_weight=0",),
    (0,),
  ),
  (
    "CoCa + TG-MIM, random masks",
    "configs/sycoca.py",
    ("method.score=random", "method.r_l=0"),
    (0,),
  ),
  (
    "SyCoCa, mask_stage=tokens",
    "configs/sycoca.py",
    ("method.mask_stage=tokens",),
    (0,),
  ),
  (
    "SyCoCa, shared decoders",
    "configs/sycoca.py",
    ("method.decoders=shared",),
    (0,),
  ),
)
MATCHING = (
  ("ALBEF", "configs/albef.py", (), (0, 1)),
  ("SIMLA", "configs/simla.py", (), (0, 1)),
  (
    "SIMLA without keywords (PSL)",
    "configs/simla.py",
    ("method.keyword_weight=0",),
    (0, 1),
  ),
  (
    "SIMLA without hidden patches and words (XMM)",
    "configs/simla.py",
    ("method.patch_weight=0", "method.word_weight=0"),
    (0, 1),
  ),
)
# What the table does not show is not measured: it takes minutes.
_UNSEEN = tuple(
  f"evals.{kind}_comp.split=nowhere"
  for kind in (
    *("retrieval", "reranking", "zeroshot", "pointing"),
    *("alignment", "binding", "relation"),
  )
)
COMPLETION = tuple(
  (name, "configs/scl.py", (*off, *_UNSEEN), (0, 1))
  for name, off in (
    (
      "SCL without completion",
      ("method.vision_weight=0", "method.language_weight=0"),
    ),
    ("vision completion alone (MVSC)", ("method.language_weight=0",)),
    ("language completion alone (MLSC)", ("method.vision_weight=0",)),
    ("SCL", ()),
  )
)
MATCHING_COLUMNS = (
  "eval/retrieval/i2t_r1",
  "eval/retrieval/t2i_r1",
  "eval/reranking/i2t_r1",
  "eval/reranking/t2i_r1",
  "eval/reranking/i2t_r10",
  "eval/reranking/t2i_r10",
  "eval/pointing/accuracy",
  "eval/binding/contrastive",
  "eval/binding/matching",
  "eval/relation/contrastive",
  "eval/relation/matching",
  "eval_comp/reranking/i2t_r1",
  "eval_comp/binding/matching",
)
COMPLETION_COLUMNS = (
  "eval/retrieval/i2t_r1",
  "eval/retrieval/t2i_r1",
  "eval/reranking/i2t_r1",
  "eval/reranking/t2i_r1",
  "eval_clips/retrieval/i2t_r1",
  "eval_clips/retrieval/t2i_r1",
  "eval_clips/reranking/i2t_r1",
  "eval_clips/reranking/t2i_r1",
  "eval/pointing/accuracy",
  "eval/alignment/local",
  "eval/binding/contrastive",
  "eval/binding/matching",
  "eval/relation/matching",
  "eval_clips/motion/contrastive",
  "eval_clips/motion/matching",
  "eval_clips/binding/matching",
)
CAPTIONING_COLUMNS = (
  "eval/retrieval/i2t_r1",
  "eval/retrieval/t2i_r1",
  "eval/retrieval/i2t_r10",
  "eval/retrieval/t2i_r10",
  "eval/captioning/true",
  "eval/pointing/accuracy",
  "eval/pointing/accuracy_cross_attention",
  "eval/zeroshot/top1",
  "eval/binding/contrastive",
  "eval/binding/captioner",
  "eval/relation/captioner",
  "eval_comp/retrieval/i2t_r1",
  "eval_comp/captioning/true",
)
TABLES = {
  "captioning": (CAPTIONING, CAPTIONING_COLUMNS),
  "matching": (MATCHING, MATCHING_COLUMNS),
  "completion": (COMPLETION, COMPLETION_COLUMNS),
}
TIMED_STEPS = 60


def slug(name: str) -> str:
  """A folder's name for a row."""
  return "".join(c if c.isalnum() else "_" for c in name.lower())


def command(config: str, changes, workdir: pathlib.Path) -> list[str]:
  """The command line of a run."""
  flags = [f"--config.{change}" for change in changes]
  return [
    *(sys.executable, "-m", "vlp_jax.main"),
    *(f"--config={config}", *flags, f"--workdir={workdir}"),
  ]


def run_side_by_side(jobs: list[list[str]], logs: pathlib.Path) -> None:
  """Runs jobs, one a core, until all have ended.

  Raises:
    RuntimeError: if a job fails, naming its log.
  """
  cores = sorted(os.sched_getaffinity(0))
  logs.mkdir(parents=True, exist_ok=True)
  running: dict[int, tuple[subprocess.Popen, pathlib.Path]] = {}
  queue = list(enumerate(jobs))
  while queue or running:
    for core in cores:
      if core not in running and queue:
        number, job = queue.pop(0)
        log = logs / f"{number}.log"
        print(f"core {core}: {shlex.join(job[2:])}", flush=True)
        with log.open("w") as file:
          process = subprocess.Popen(
            ["taskset", "-c", str(core), *job],
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        running[core] = process, log
    time.sleep(0.5)
    for core, (process, log) in list(running.items()):
      if process.poll() is not None:
        del running[core]
        if process.returncode:
          raise RuntimeError(f"a run failed: see {log}")


def seconds_per_step(workdir: pathlib.Path) -> float:
  """Reads a timed run's rate, which leaves out compiling and evaluating."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rates = [json.loads(line).get("time/examples_per_second") for line in lines]
  config = json.loads((workdir / "config.json").read_text())
  clips, size = config["clips"], config["batch_size"]
  examples = size + clips["share"] * ((clips["batch_size"] or size) - size)
  return examples / [rate for rate in rates if rate][-1]


def calibrate(rows, output: pathlib.Path, seconds: float) -> dict[str, int]:
  """Finds how many steps of each row fit into the time."""
  path = output / "steps.json"
  if path.exists():
    return json.loads(path.read_text())
  jobs = []
  for name, config, changes, _ in rows:
    evals = config_lib.load(config).evals
    short = (
      *changes,
      f"total_steps={TIMED_STEPS}",
      "log.every_steps=10",
      *(f"evals.{evaluation}.max_examples=64" for evaluation in evals),
    )
    workdir = output / "timed" / slug(name)
    if not (workdir / "results.json").exists():
      jobs.append(command(config, short, workdir))
  run_side_by_side(jobs, output / "timed" / "logs")
  steps = {
    name: int(seconds / seconds_per_step(output / "timed" / slug(name)))
    for name, *_ in rows
  }
  path.write_text(json.dumps(steps, indent=2) + "\n")
  return steps


def table(rows, columns, output: pathlib.Path, steps: dict[str, int]) -> str:
  """Makes the table in Markdown: a row's mean, and its seeds' spread."""
  heads = [name.removeprefix("eval/").removeprefix("eval_") for name in columns]
  text = ["| row | seeds | steps | " + " | ".join(heads) + " |"]
  text.append("|" + "---|" * (len(heads) + 3))
  constants = {}
  for name, _, _, seeds in rows:
    results = [
      json.loads((output / f"{slug(name)}_{seed}" / "results.json").read_text())
      for seed in seeds
    ]
    metrics = [result["metrics"] for result in results]
    # Chance and baselines are the same in every row, but for what captions of
    # other pictures score: that is the first row's.
    constants = metrics[0] | constants
    cells = []
    for column in columns:
      values = [m[column] for m in metrics if column in m]
      cell = f"{statistics.mean(values):.3f}" if values else "–"
      if len(values) > 1:
        cell += f" ({min(values):.3f}–{max(values):.3f})"
      cells.append(cell)
    row = [name, str(len(seeds)), str(steps[name]), *cells]
    text.append("| " + " | ".join(row) + " |")
  for name, where in (
    ("bag of attributes", lambda c: (f"{c}_bag", f"{c.rsplit('/', 1)[0]}/bag")),
    ("chance", lambda c: (f"{c}_chance",)),
  ):
    cells = [
      next((f"{constants[k]:.3f}" for k in where(c) if k in constants), "–")
      for c in columns
    ]
    text.append(f"| {name} | | | " + " | ".join(cells) + " |")
  return "\n".join(text) + "\n"


def main() -> None:
  """Calibrates, trains what is missing, writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--minutes", type=float, default=7.0)
  parser.add_argument("--table", choices=TABLES, default="captioning")
  parser.add_argument("--output", type=pathlib.Path, default="runs/compare")
  args = parser.parse_args()
  args.output.mkdir(parents=True, exist_ok=True)
  rows, columns = TABLES[args.table]
  steps = calibrate(rows, args.output, args.minutes * 60)
  jobs = []
  commands = []
  for name, config, changes, seeds in rows:
    for seed in seeds:
      workdir = args.output / f"{slug(name)}_{seed}"
      changed = (*changes, f"seed={seed}", f"total_steps={steps[name]}")
      job = command(config, changed, workdir)
      commands.append(
        f"{name}, seed {seed}: {shlex.join(['python', *job[1:]])}"
      )
      if not (workdir / "results.json").exists():
        jobs.append(job)
  run_side_by_side(jobs, args.output / "logs")
  text = (
    table(rows, columns, args.output, steps) + "\n" + "\n".join(commands) + "\n"
  )
  (args.output / "table.md").write_text(text)
  print(text)


if __name__ == "__main__":
  main()
