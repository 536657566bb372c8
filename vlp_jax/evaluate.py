"""Evaluates a checkpoint: `python -m vlp_jax.evaluate --workdir=runs/sycoca`.

  --workdir=DIR            a folder that vlp_jax.main has trained in
  --step=N                 which checkpoint (default: the last)
  --best                   the checkpoint with the best validation metric
  --ema                    the moving average of the parameters
  --config.FIELD=VALUE     overrides a field, for instance
                           --config.data.source=mine.jsonl

Prints a table, and writes evaluation_<step>.json into the folder.
"""

import json
from collections.abc import Sequence

from vlp_jax import command, hosts, metrics, runs, train
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base as evaluators
from vlp_jax.flags import parse_flags, print_help

FLAGS = dict(workdir="", step=-1, best=False, ema=False)


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
    path = workdir / f"evaluation_{run.step}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
  metrics.print_table(results)


if __name__ == "__main__":
  command.execute(main)
