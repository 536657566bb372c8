"""Trains: `python -m vlp_jax.main --config=configs/sycoca.py`.

--config=FILE[:SIZE]     a file of configs/, and one of its sizes
--config.FIELD=VALUE     overrides a field
--workdir=DIR            where everything goes (default runs/<config name>);
                         starting again in the same folder resumes
"""

from collections.abc import Sequence

from vlp_jax import garbage, preemption, step_memory

if __name__ == "__main__":  # before anything is imported, which takes seconds
  step_memory.use()
  garbage.ignore()
  preemption.end_on_sigterm()

from vlp_jax import command, hosts, train
from vlp_jax import config as config_lib


def main(argv: Sequence[str]) -> None:
  """Reads the command line and trains."""
  config, flags = config_lib.parse_command_line(
    argv, {"workdir": ""}, usage=__doc__
  )
  step_memory.stay_in_main_thread()
  hosts.initialize()
  command.keep_compiled()
  workdir = flags["workdir"] or f"runs/{config_lib.name_of(flags['config'])}"
  train.run(config, workdir)


if __name__ == "__main__":
  command.execute(main)
