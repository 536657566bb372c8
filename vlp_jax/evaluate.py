"""Evaluates a checkpoint: `python -m vlp_jax.evaluate --workdir=runs/sycoca`.

  --workdir=DIR            a folder that vlp_jax.main has trained in
  --step=N                 which checkpoint (default: the last)
  --best                   the checkpoint with the best validation metric
  --ema                    the moving average of the parameters
  --config.FIELD=VALUE     overrides a field, for instance
                           --config.data.source=mine.jsonl

Prints a table, and writes evaluation_<step>.json into the folder; with the
average evaluation_<step>_ema.json, and with other data than the run's a name
that has theirs and a hash. What is not finite is null there.
"""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlp_jax import command, hosts, metrics, runs, train
from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base as evaluators
from vlp_jax.flags import parse_flags, print_help

FLAGS = dict(workdir="", step=-1, best=False, ema=False)

# Fields that say what is evaluated, but for those that change no number.
_EVALUATED = ("data.", "clips.", "evals.", "tokenizer.", "model.", "method.")
_NO_NUMBER = ("num_workers", "max_bad", "every_steps", "batch_size")


def main(argv: Sequence[str]) -> None:
  """Reads the command line and evaluates."""
  print_help(argv, __doc__)
  flags, overrides = parse_flags(argv, FLAGS)
  if not flags["workdir"]:
    raise UserError("--workdir=DIR is missing; --help shows the usage")
  config = runs.read_config(flags["workdir"], overrides)
  hosts.initialize(saves=False)
  command.keep_compiled()
  run = runs.open_run(
    flags["workdir"],
    config,
    step=None if flags["step"] < 0 else flags["step"],
    best=flags["best"],
    use_ema=flags["ema"],
  )
  workdir = command.make_folder(flags["workdir"])
  env = evaluators.Env(config, run.mesh, run.tokenizer, workdir)
  built = evaluators.build_all(run.method, env)
  if hosts.is_first():
    print(f"{flags['workdir']}, step {run.step:,}")
  results = train.evaluate(built, config, run.params, run.params)
  if hosts.is_first():
    path = workdir / file_name(
      run.step, flags["ema"], runs.read_config(workdir), config
    )
    values = {k: v if math.isfinite(v) else None for k, v in results.items()}
    path.write_text(json.dumps(values, indent=2) + "\n")
    print(f"wrote {path}")
  metrics.print_table(results)


def file_name(
  step: int, use_ema: bool, trained: ConfigDict, config: ConfigDict
) -> str:
  """Names the file of an evaluation so that none takes another's place.

  Args:
    step: of the checkpoint.
    use_ema: whether the moving average is evaluated.
    trained: the run's config.
    config: the same with overrides.

  Returns:
    `evaluation_<step>.json` of the run's own data; `_ema` comes before the
    dot for the average, and then the name of other data and a hash of all
    fields that may change a number and differ.
  """
  parts = [f"evaluation_{step}"] + ["ema"] * use_ema
  differ = []
  for line in config_lib.diff(trained, config):
    field = line.partition(": ")[0]
    if field.startswith(_EVALUATED) and not field.endswith(_NO_NUMBER):
      differ.append(line)
  for section in ("data", "clips"):
    fields = tuple(f"{section}.{field}: " for field in ("name", "source"))
    if any(line.startswith(fields) for line in differ):
      data = config[section]
      name = pathlib.Path(data.source).stem or data.name
      parts.append(re.sub(r"[^\w.-]+", "-", name).strip("-")[-40:])
  if differ:
    digest = hashlib.sha256("\n".join(differ).encode()).hexdigest()
    parts.append(digest[:8])
  return "_".join(filter(None, parts)) + ".json"


if __name__ == "__main__":
  command.execute(main)
