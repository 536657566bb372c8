"""Exports a run: `python -m vlp_jax.export --workdir=runs/sycoca --output=DIR`.

--workdir=DIR     a folder that vlp_jax.main has trained in
--output=DIR      a new folder (default: <workdir>/export)
--format=orbax    parameters in an Orbax checkpoint, with the config, the
                  tokenizer and the preprocessing; vlp_jax.load reads it
--step=N          which checkpoint (default: the last)
--best            the checkpoint with the best validation metric
--ema             the moving average of the parameters
"""

import json
import pathlib
from collections.abc import Sequence

from vlp_jax import checkpoint, command, hosts, runs
from vlp_jax import config as config_lib
from vlp_jax.data import joint, transforms
from vlp_jax.errors import UserError
from vlp_jax.flags import parse_flags, print_help
from vlp_jax.ops import patches

FORMATS = ("orbax",)
FLAGS = dict(
  workdir="", output="", format="orbax", step=-1, best=False, ema=False
)

# What `data.eval_resize` does.
_RESIZE = {
  "crop": "short side; then centre crop",
  "stretch": "both sides, whatever the shape; nothing is cut off",
}


def main(argv: Sequence[str]) -> None:
  """Reads the command line and exports."""
  print_help(argv, __doc__)
  flags, overrides = parse_flags(argv, FLAGS)
  if not flags["workdir"]:
    raise UserError("--workdir=DIR is missing; --help shows the usage")
  if flags["format"] not in FORMATS:
    raise UserError(
      f"--format={flags['format']} is not one of {', '.join(FORMATS)}"
    )
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
  output = pathlib.Path(flags["output"] or f"{flags['workdir']}/export")
  export(run, output)
  if hosts.is_first():
    print(
      f"exported step {run.step:,} to {output}; vlp_jax.load({str(output)!r})"
    )


def export(run: runs.Run, output: pathlib.Path) -> None:
  """Writes a run's parameters and all that is needed to use them.

  Raises:
    UserError: if `output` holds an export already or cannot be written, or the
      config's `data.eval_resize` is none.
  """
  if (output / "params").exists():
    raise UserError(f"{output} holds an export already; give another --output")
  transforms.eval_geometry(run.config.data)  # refuses what is none
  output = command.make_folder(output)
  if hosts.is_first():
    _describe(run, output)
  checkpoint.save_params(output / "params", run.params)


def _describe(run: runs.Run, output: pathlib.Path) -> None:
  """Writes all but the parameters."""
  config_lib.save(run.config, output / "config.json")
  (output / "tokenizer.model").write_bytes(run.tokenizer.model)
  data = run.config.data
  preprocessing = {
    "image_size": data.image_size,
    "eval_resize": data.eval_resize,
    "resize": f"bicubic, antialiased, {_RESIZE[data.eval_resize]}",
    "num_frames": data.num_frames,
    "mean": patches.MEAN,
    "std": patches.STD,
    "max_len": run.config.tokenizer.max_len,
    "step": run.step,
  }
  if joint.has_clips(run.config):
    clips = joint.of_clips(run.config).data
    fields = "image_size", "num_frames"
    preprocessing["clips"] = {field: clips[field] for field in fields}
  text = json.dumps(preprocessing, indent=2) + "\n"
  (output / "preprocessing.json").write_text(text)


if __name__ == "__main__":
  command.execute(main)
