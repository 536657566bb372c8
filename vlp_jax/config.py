"""Configs: the common fields, loading, overriding, checking, comparing.

A config is an `ml_collections.ConfigDict` that a file in `configs/` makes
with `get_config(size)`. The command line names the file, and may override
any field that exists: `--config=configs/coca.py:debug --config.batch_size=8`.
Every mistake is a `UserError` of one line.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import profiling
from vlp_jax.errors import UserError
from vlp_jax.fields import default_config
from vlp_jax.flags import did_you_mean, parse_flags, parse_value

_PACKAGE = pathlib.Path(__file__).resolve().parent

_FREE_DATA = ("num_workers", "val_split", "test_split", "max_bad")
# What a resumed run may change, since no trained number depends on it: how
# often to log, save and evaluate, on what, with how many workers to read, what
# to trace and when to give up.
# Another mesh computes the same up to the order of float additions.
_FREE_ON_RESUME = ("log.", "checkpoint.", "evals.", "mesh.", "profile:")
_FREE_ON_RESUME += ("optimizer.max_skipped:",)
_FREE_ON_RESUME += tuple(f"data.{field}" for field in _FREE_DATA)
# The length of a run shapes its learning rates from the first step on, so it
# is free only where the schedule does not look at it.
_LENGTH = ("total_steps", "total_epochs", "total_examples")
# What numbers must be at least, where that is not 0. A text has two tokens at
# least, its start and its end.
_LOW = {"batch_size": 1, "accumulate": 1, "checkpoint.keep": 1}
_LOW |= {"tokenizer.max_len": 2}
_EVALS_LOW = {"batch_size": 1, "max_examples": 0}


def choose(size: str, sizes: Mapping[str, Any]) -> Any:
  """Returns `sizes[size]`: what a config file does with its argument.

  Raises:
    UserError: if there is no such size; the message lists those that exist.
  """
  if size not in sizes:
    raise UserError(f"no size {size!r}; the sizes are {', '.join(sizes)}")
  return sizes[size]


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Loads `path/to/config.py[:size]`, applies overrides and locks it.

  Args:
    spec: a file (sought in the current directory, then in the repository,
      then in the installed package) and the argument of its `get_config`.
    overrides: strings `a.b.c=value`, typed by the field's present value.

  Raises:
    UserError: on a missing or broken file, an unknown size or field, or a
      value of another type.
  """
  path, _, size = spec.partition(":")
  file = str(find(path).resolve())
  module_spec = importlib.util.spec_from_file_location(name_of(path), file)
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    config = module.get_config(*[size] if size else [])
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:  # the file is the user's, and so are its bugs
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    line = getattr(error, "lineno", None) or [1, *lines][-1]
    raise UserError(
      f"{path}, line {line}: {type(error).__name__}: {error}"
    ) from error
  for section, field in ("data", "mix"), ("optimizer", "multipliers"):
    if isinstance(config[section][field], Mapping):
      config[section][field] = json.dumps(dict(config[section][field]))
  return override(config, overrides)


def find(path: str) -> pathlib.Path:
  """Finds a config file from any directory.

  Raises:
    UserError: if there is none, naming the nearest.
  """
  name = pathlib.Path(path)
  inside = _PACKAGE / "configs"  # where an installed package keeps `configs/`
  places = [name, _PACKAGE.parent / name]
  if name.parts[:1] == ("configs",):
    places.append(inside.joinpath(*name.parts[1:]))
  for place in places:
    if place.is_file():
      return place
  known = [
    f"configs/{file.relative_to(folder)}"
    for folder in (_PACKAGE.parent / "configs", inside)
    for file in folder.rglob("[!_]*.py")
  ]
  raise UserError(f"no config file {path!r}{did_you_mean(path, known)}")


def name_of(spec: str) -> str:
  """Names a run after its config: `configs/coca.py:debug` -> `coca_debug`."""
  path, _, size = spec.partition(":")
  return pathlib.Path(path).stem + (f"_{size}" if size else "")


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """Sets fields in place from `a.b.c=value`; returns `config`, locked.

  Who names a data set (`data.name`, `clips.name`) means it to be used: a
  `source` of before, which would go first, is cleared.

  Raises:
    UserError: on an unknown field (naming the nearest) or a bad value.
  """
  config.lock()
  fields = dict(flatten(config))
  for item in overrides:
    name, equals, text = item.partition("=")
    if name not in fields:
      inside = [field for field in fields if field.startswith(f"{name}.")]
      hint = f"; its fields are {', '.join(inside)}" if inside else ""
      hint = hint or did_you_mean(name, list(fields))
      raise UserError(f"no config field {name!r}{hint}")
    if not equals:
      raise UserError(f"--config.{name} lacks a value: --config.{name}=VALUE")
    section, _, field = name.rpartition(".")
    value = parse_value(f"config.{name}", text, fields[name])
    (config[section] if section else config)[field] = value
  given = {item.partition("=")[0] for item in overrides}
  for section in ("data", "clips"):
    named = f"{section}.name" in given and config[section].name
    if named and f"{section}.source" not in given:
      config[section].source = ""
  return config


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted name and the value of every field."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def parse_command_line(
  argv: Sequence[str], flags: Mapping[str, Any], usage: str
) -> tuple[ConfigDict, dict[str, Any]]:
  """Parses `--config=FILE[:SIZE] --config.FIELD=VALUE ... --FLAG=VALUE ...`.

  Args:
    argv: the arguments, without the program's name.
    flags: the command's other flags and their defaults, which type them.
    usage: what `--help` prints, before the config's docstring and fields.

  Returns:
    The config; and the values of `flags`, with `config`, the spec.

  Raises:
    UserError: on any mistake.
    SystemExit: with status 0, after `--help`.
  """
  options = [arg for arg in argv if arg not in ("-h", "--help")]
  values, overrides = parse_flags(options, {"config": "", **flags})
  spec = values["config"]
  if len(options) < len(argv):
    print(usage.strip())
    if spec:
      text = find(spec.partition(":")[0]).read_text()
      print(f"\n{spec}: {ast.get_docstring(ast.parse(text))}\n")
      for name, value in flatten(load(spec, overrides)):
        print(f"  --config.{name}={value}")
    sys.exit(0)
  if not spec:
    raise UserError("--config=FILE[:SIZE] is missing; --help shows the usage")
  return load(spec, overrides), values


def num_steps(config: ConfigDict, num_examples: int) -> int:
  """Returns the run's number of updates; `num_examples` make an epoch."""
  return _steps(config, "total", config.batch_size, num_examples)


def warmup_steps(config: ConfigDict, num_examples: int) -> int:
  """Returns the number of warm-up updates; `num_examples` make an epoch."""
  return _steps(config.schedule, "warmup", config.batch_size, num_examples)


def _steps(section, prefix: str, batch_size: int, num_examples: int) -> int:
  if section[f"{prefix}_steps"]:
    return section[f"{prefix}_steps"]
  epochs = section[f"{prefix}_epochs"] * num_examples
  return math.ceil((epochs or section[f"{prefix}_examples"]) / batch_size)


def mesh_shape(config: ConfigDict, num_devices: int) -> tuple[int, int, int]:
  """Resolves `config.mesh` to the sizes of (data, fsdp, tensor).

  Raises:
    UserError: if no such mesh has `num_devices` devices.
  """
  axes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
  fixed = math.prod(axis for axis in axes if axis != -1)
  if axes.count(-1) == 1 and fixed > 0:
    axes[axes.index(-1)] = num_devices // fixed
  if min(axes) < 1 or math.prod(axes) != num_devices:
    text = " x ".join(f"{axis}={n}" for axis, n in config.mesh.items())
    raise UserError(
      f"config.mesh ({text}) does not make {num_devices} devices: its product "
      "must, where one -1 stands for all remaining devices"
    )
  return tuple(axes)


def validate(
  config: ConfigDict, num_devices: int = 1, match_group: int = 1
) -> None:
  """Raises a `UserError` on what cannot work, before anything is built.

  Args:
    config: the config.
    num_devices: of all processes.
    match_group: the method's; no device or chunk may cut a group.
  """
  fields = dict(flatten(config))
  check_low(config)
  for name in ("optimizer.b1", "optimizer.b2", "ema.decay"):
    if not 0 <= fields[name] < 1:
      raise UserError(f"config.{name} is {fields[name]}, not in [0, 1)")
  lengths = [name for name in _LENGTH if fields[name]]
  if not lengths or (len(lengths) > 1 and "total_steps" not in lengths):
    raise UserError(
      "set exactly one of config.total_steps, config.total_epochs and "
      f"config.total_examples (set: {', '.join(lengths) or 'none'})"
    )
  if config.cpu_optimization_level > 3:
    raise UserError(
      f"config.cpu_optimization_level is {config.cpu_optimization_level}, but "
      "must be 0 to 3"
    )
  profiling.parse(config.profile)
  data, fsdp, _ = mesh_shape(config, num_devices)
  # A chunk takes an equal part of each device's rows. In one piece, groups may
  # reach over devices.
  unit = data * fsdp * config.accumulate
  whole = config.accumulate == 1
  unit = math.lcm(unit, match_group) if whole else unit * match_group
  if config.batch_size % unit:
    near = max(1, round(config.batch_size / unit)) * unit
    raise UserError(
      f"config.batch_size={config.batch_size} is no multiple of {unit} = "
      f"data {data} x fsdp {fsdp} x accumulate {config.accumulate} x match "
      f"group {match_group}; the nearest is {near}"
    )
  for name in fields:
    if name.startswith("model."):
      _check_fit(name, fields)


def check_low(config: ConfigDict) -> None:
  """Raises a `UserError` on a number that is below what has a meaning."""
  for name, value in flatten(config):
    section = name.partition(".")[0]
    low = _LOW.get(name, 0)
    if section == "evals":
      low = _EVALS_LOW.get(name.rpartition(".")[2], -math.inf)
    free = section in ("mesh", "model", "method")
    if not free and isinstance(value, (int, float)) and value < low:
      raise UserError(f"config.{name} is {value}, but must be >= {low}")


def _check_fit(name: str, fields: Mapping[str, Any]) -> None:
  """Checks a field of any tower in `model` against what it must divide."""
  section, _, field = name.rpartition(".")
  other = {
    "num_heads": f"{section}.width",
    "patch_size": "data.image_size",
    "max_len": "tokenizer.max_len",
  }.get(field)
  if other not in fields:
    return
  value, size = fields[name], fields[other]
  problem = "exceeds" if field == "max_len" else "is not a multiple of"
  if size > value if field == "max_len" else value < 1 or size % value:
    raise UserError(f"config.{other}={size} {problem} config.{name}={value}")


def to_json(config: ConfigDict) -> str:
  """Writes a config as JSON; `from_json` reads it back, equal."""
  return config.to_json(indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
  """Reads what `to_json` wrote; common fields that are new have defaults."""

  def tuples(value):  # they became lists
    if isinstance(value, dict):
      return {name: tuples(item) for name, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  try:
    config = ConfigDict(tuples(json.loads(text)))
  except ValueError as error:
    raise UserError(f"not a config in JSON: {error}") from None
  for name, section in default_config().items():
    if isinstance(section, ConfigDict):
      known = config[name].to_dict() if name in config else {}
      config[name] = section.to_dict() | known
    elif name not in config:
      config[name] = section
  return config.lock()


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Lists the fields that differ, as lines `field: old -> new`."""
  old, new = dict(flatten(old)), dict(flatten(new))
  missing = "(none)"
  return [
    f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
    for name in sorted({**old, **new})
    if old.get(name, missing) != new.get(name, missing)
  ]


def save(config: ConfigDict, path: str | os.PathLike) -> None:
  """Writes `path` as JSON, whole or not at all."""
  path = pathlib.Path(path)
  partial = path.with_suffix(".partial")
  partial.write_text(to_json(config))
  partial.replace(path)


def check_same(config: ConfigDict, path: str | os.PathLike) -> None:
  """Refuses to go on with a run that another config began.

  Free to differ are logging, checkpoints, evaluations, profiles, the mesh, the
  number of workers and what stops a run (bad records, skipped updates): no
  trained number depends on them; and the length of the run where
  `schedule.name` is 'constant'.

  Args:
    config: of the run that starts.
    path: the `config.json` of the run that began; it may be missing.

  Raises:
    UserError: with the fields that differ.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  constant = config.schedule.name == "constant"
  free = _FREE_ON_RESUME + (_LENGTH if constant else ())
  changes = diff(from_json(path.read_text()), config)
  lines = [line for line in changes if not line.startswith(free)]
  if lines:
    raise UserError(
      f"{path.parent} holds a run of another config ({'; '.join(lines)}); "
      "give another --workdir, or the same config to resume"
    )
