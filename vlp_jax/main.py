"""Trains: `python -m vlp_jax.main --config=configs/sycoca.py`.

  --config=FILE[:SIZE]     a file of configs/, and one of its sizes
  --config.FIELD=VALUE     overrides a field
  --workdir=DIR            where everything goes (default runs/<config name>);
                           starting again in the same folder resumes
"""

from collections.abc import Sequence

from vlp_jax import command, config as config_lib


def main(argv: Sequence[str]) -> None:
  """Reads the command line and trains."""
  config, flags = config_lib.parse_command_line(
    argv, {"workdir": ""}, usage=__doc__
  )
  command.set_up_devices(config.batch_size // max(config.accumulate, 1))
  from vlp_jax import train  # after the devices are set up

  workdir = flags["workdir"] or f"runs/{config_lib.name_of(flags['config'])}"
  train.run(config, workdir)


if __name__ == "__main__":
  command.execute(main)
