"""Opens a run that has been trained: for `evaluate` and `export`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from vlp_jax import checkpoint, sharding, train_state
from vlp_jax import config as config_lib
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError
from vlp_jax.methods import base as methods
from vlp_jax.methods.base import Method, Params


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run.

  Attributes:
    config: as it was trained, with overrides.
    method: the method.
    params: of a checkpoint; the moving average if that was asked for.
    step: of the checkpoint.
    tokenizer: the run's own.
    mesh: where the parameters are.
  """

  config: ConfigDict
  method: Method
  params: Params
  step: int
  tokenizer: tokenizer_lib.Tokenizer
  mesh: jax.sharding.Mesh


def read_config(
  workdir: str | os.PathLike, overrides: Sequence[str] = ()
) -> ConfigDict:
  """Reads a run's config.

  Raises:
    UserError: if `workdir` holds no run, or an override is wrong.
  """
  path = pathlib.Path(workdir) / "config.json"
  if not path.is_file():
    raise UserError(f"no run in {workdir}: {path} does not exist")
  config = config_lib.from_json(path.read_text())
  config = config_lib.override(config, overrides)
  config_lib.check_low(config)
  return config


def open_run(
  workdir: str | os.PathLike,
  config: ConfigDict,
  *,
  step: int | None = None,
  best: bool = False,
  use_ema: bool = False,
) -> Run:
  """Restores the parameters of a run.

  Args:
    workdir: of the run; it is only read.
    config: of `read_config`.
    step: of the checkpoint; None is the last.
    best: take the checkpoint where `checkpoint.best_metric` was highest.
    use_ema: take the moving average of the parameters.

  Raises:
    UserError: if there is no such checkpoint or average.
  """
  workdir = pathlib.Path(workdir)
  method = methods.get(config.method.name, config)
  mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
  abstract = train_state.abstract_params(method, config)
  abstract = sharding.with_shardings(abstract, mesh)
  checkpoints = checkpoint.Checkpointer(
    workdir / "checkpoints",
    best_metric=config.checkpoint.best_metric,
    writable=False,
  )
  if best:
    step = checkpoints.best_step()
    if step is None:
      raise UserError(
        f"{workdir} kept no best checkpoint: config.checkpoint.best_metric="
        f"{config.checkpoint.best_metric!r} was never measured"
      )
  step = checkpoints.latest_step() if step is None else step
  params, average, _ = checkpoints.restore_params(abstract, step)
  checkpoints.close()
  if use_ema and average is None:
    raise UserError(f"{workdir} kept no average: its config.ema.decay is 0")
  tokenizer = tokenizer_lib.Tokenizer(
    (workdir / "tokenizer.model").read_bytes()
  )
  return Run(
    config, method, average if use_ema else params, step, tokenizer, mesh
  )
