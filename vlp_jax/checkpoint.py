"""Checkpoints: asynchronous, atomic, restored onto any mesh, bit for bit.

The one module that knows Orbax. A checkpoint is a folder named after its
step; it appears under that name when it is whole, so a run killed while it
saves leaves the one before. Inside are `state` (every array of the training
state) and `meta` (JSON), with checksums of both: the arrays' files have none.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vlp_jax import checksums, hosts, quiet
from vlp_jax.errors import UserError

# How TensorStore begins to tell of files that are not whole; there are others,
# such as UNAVAILABLE. And what Orbax raises, which believes what it reads.
_DAMAGE = ("DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE")
_STATUS = re.compile("([A-Z_]{4,}): ")
_DAMAGED = (FileNotFoundError, LookupError, ValueError, TypeError)
_DAMAGED += (AttributeError, NotImplementedError)
_CHECKSUMS = "checksums"  # in `meta`
# Troubles with the disk that TensorStore, too, names in these words.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_SHOWN = 5  # leaves that a message names
_HINT = "; remove it to use another"


class Checkpointer:
  """The checkpoints of one run."""

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int = 1,
    best_metric: str = "",
    *,
    writable: bool = True,
  ):
    """Opens a folder, and clears what a killed run left unfinished in it.

    Args:
      directory: holds the checkpoints; made if `writable`.
      keep: how many of the last to keep.
      best_metric: the name of a metric; the checkpoint where it was highest
        is kept as well (of several, the last).
      writable: False leaves the folder as it is: for evaluating a run that
        may be going on.

    Raises:
      UserError: if the folder cannot be made or written.
    """
    quiet.hush()
    self._directory = pathlib.Path(directory).absolute()
    self._best_metric = best_metric
    kept = [policies.LatestN(keep)]
    if best_metric:
      kept.append(policies.BestN(get_metric_fn=self._score, n=1))
    options = ocp.CheckpointManagerOptions(
      create=writable,
      cleanup_tmp_directories=writable,
      best_fn=self._score if best_metric else None,
      preservation_policy=policies.AnyPreservationPolicy(kept),
      # A folder that cannot be made is told at once; in the background, the
      # threads that wait for it would keep the process for five minutes.
      async_options=ocp.options.AsyncOptions(
        create_directories_asynchronously=False
      ),
    )
    with _explained(self._directory):
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=options,
        item_handlers={
          "state": ocp.StandardCheckpointHandler(),
          "meta": ocp.JsonCheckpointHandler(),
        },
      )

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Copies the state off the devices, and writes it in the background.

    The state may be donated as soon as this returns. A step that is already
    saved is left as it is.

    Args:
      step: finished updates.
      state: a pytree of arrays.
      meta: what JSON can hold.
      metrics: if `best_metric` is among them, it ranks this checkpoint.

    Raises:
      UserError: if this save cannot begin, or the one before did not end,
        for want of space or permission.
    """
    if step in self._manager.all_steps():
      return
    sums = checksums.make(_flat(state), meta)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      meta=ocp.args.JsonSave({**meta, _CHECKSUMS: sums}),
    )
    ranked = None
    if self._best_metric:
      score = self._score(metrics or {})
      ranked = {self._best_metric: score if score == score else -math.inf}
    with _explained(self._directory):
      # By force: else Orbax, too, asks whether to stop, and hosts would count
      # their steps in two ways.
      self._manager.save(step, args=args, metrics=ranked, force=True)

  def latest_step(self, before: float = math.inf) -> int | None:
    """Returns the last step that was saved, of those before one, or None."""
    steps = self._manager.all_steps()
    return max((step for step in steps if step < before), default=None)

  def best_step(self) -> int | None:
    """Returns the kept step where `best_metric` is highest, or None."""
    if not self._best_metric:
      return None
    step = self._manager.best_step()
    if step is None or self._score(self._manager.metrics(step)) == -math.inf:
      return None
    return step

  def restore(
    self, abstract: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]]:
    """Restores a whole state.

    Without `step`, a last checkpoint whose files are damaged is set aside
    (renamed to `<step>.damaged`), and the one before is taken; of several hosts
    each may see other damage, so they take it when they are started again.

    Args:
      abstract: `ShapeDtypeStruct`s with shardings, of any mesh, in the
        structure of the state that was saved.
      step: which one; None is the last.

    Returns:
      The state, and `meta`.

    Raises:
      StartAgainError: if one of several hosts has set a checkpoint aside.
      UserError: if there is none, if it is of another structure (naming the
        leaves), or if a step that was asked for is damaged.
    """
    while True:
      path = self._choose(step)
      try:
        with _readable(path):
          _check_structure(path, self._saved(path), _describe(abstract))
          restored = self._manager.restore(
            int(path.name),
            args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              meta=ocp.args.JsonRestore(),
            ),
          )
          meta = _verified(path, abstract, restored.state, restored.meta)
        return restored.state, meta
      except _DamagedError as damage:
        alone = not hosts.several()
        if step is not None or not (alone or self._manager.all_steps()[1:]):
          raise
        text = str(damage).removesuffix(_HINT)
        _set_aside(path)
        if not alone:
          raise hosts.StartAgainError(
            f"{text}; set aside: the same command takes the one before"
          ) from damage
        logging.getLogger(__name__).warning("%s; using the one before", text)
        self._manager.reload()

  def restore_params(
    self, abstract: Any, step: int | None = None
  ) -> tuple[Any, Any | None, dict[str, Any]]:
    """Restores what evaluation and export need; never the optimizer.

    Args:
      abstract: `ShapeDtypeStruct`s with shardings, of the parameters.
      step: which one; None is the last.

    Returns:
      The parameters, their moving average (None if the run kept none), and
      `meta`.

    Raises:
      UserError: as in `restore`.
    """
    path = self._choose(step)
    with _readable(path):
      saved, wanted = self._saved(path), {"params": abstract}
      if any(name.startswith("ema_params/") for name in saved):
        wanted["ema_params"] = abstract
      known = {k: v for k, v in saved.items() if k.split("/")[0] in wanted}
      _check_structure(path, known, _describe(wanted))
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
          path / "state",
          args=ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
          ),
        )
      meta = self._manager.restore(
        int(path.name), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      ).meta
      meta = _verified(path, wanted, restored, meta)
    return restored["params"], restored.get("ema_params"), meta

  def wait(self) -> None:
    """Returns when the save that is under way is on the disk.

    Raises:
      UserError: if it failed for want of space or permission.
    """
    with _explained(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads. Raises as `wait` does."""
    with _explained(self._directory):
      self._manager.close()

  def _score(self, metrics: Mapping[str, float]) -> float:
    return metrics.get(self._best_metric, -math.inf)

  def _choose(self, step: int | None) -> pathlib.Path:
    steps = self._manager.all_steps()
    if not steps:
      raise UserError(f"no checkpoint in {self._directory}")
    if step is not None and step not in steps:
      raise UserError(
        f"no checkpoint of step {step} in {self._directory}; there are "
        f"{', '.join(map(str, steps))}"
      )
    return self._directory / str(steps[-1] if step is None else step)

  def _saved(self, path: pathlib.Path) -> dict[str, str]:
    return _describe_saved(self._manager.item_metadata(int(path.name))["state"])


def save_params(path: str | os.PathLike, params: Any) -> None:
  """Writes parameters alone, for `load_params`; whole or not at all.

  Raises:
    UserError: for want of space or permission.
  """
  path = pathlib.Path(path).absolute()
  quiet.hush()
  writer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
  with _explained(path), writer:
    writer.save(path, args=ocp.args.StandardSave(params))


def load_params(path: str | os.PathLike, abstract: Any) -> Any:
  """Reads what `save_params` wrote.

  Args:
    path: of the folder.
    abstract: `ShapeDtypeStruct`s with shardings.

  Raises:
    UserError: if it is missing, damaged or of another structure.
  """
  path = pathlib.Path(path).absolute()
  quiet.hush()
  if not path.is_dir():
    raise UserError(f"no parameters in {path}")
  reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
  with _readable(path), reader:
    saved = _describe_saved(reader.metadata(path).item_metadata)
    _check_structure(path, saved, _describe(abstract))
    return reader.restore(path, args=ocp.args.StandardRestore(abstract))


class _DamagedError(UserError):
  """Files that are not whole."""


def _damaged(path: pathlib.Path, reason: str) -> _DamagedError:
  return _DamagedError(f"checkpoint {path} is damaged ({reason}){_HINT}")


def _set_aside(path: pathlib.Path) -> None:
  """Renames a damaged checkpoint, to a name that none has had before."""
  aside, number = path.with_suffix(".damaged"), 2
  while aside.exists():
    aside, number = path.with_suffix(f".damaged{number}"), number + 1
  with suppress(FileNotFoundError):  # another host was first
    path.rename(aside)


@contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
  """Tells damaged files from other errors, which are ours."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    *_, root = causes = list(_causes(error))
    if not _is_damage(causes):
      raise
    text = f"{type(root).__name__}: {root}".splitlines()[0][:150]
    raise _damaged(path, text) from error


@contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  """Turns a full disk and missing permissions into a `UserError`."""
  try:
    yield
  except Exception as error:
    for reason in filter(None, map(_disk_trouble, _causes(error))):
      raise UserError(
        f"cannot write {path} ({reason}); mend that, or choose another "
        "folder, and start again"
      ) from error
    raise


def _verified(
  path: pathlib.Path, wanted: Any, tree: Any, meta: dict[str, Any]
) -> dict[str, Any]:
  """Compares what was restored with its checksums; returns `meta` without."""
  rest = {name: value for name, value in meta.items() if name != _CHECKSUMS}
  arrays, types = _flat(tree), _flat(wanted)
  wrong = [name for name, x in arrays.items() if x.dtype != types[name].dtype]
  if not wrong and _CHECKSUMS in meta:  # else saved before there were any
    wrong = checksums.differ(meta[_CHECKSUMS], arrays, rest)
  if wrong:
    more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    raise _damaged(
      path, f"what was saved is not what is read: {wrong[0]}{more}"
    )
  return rest


def _flat(tree: Any) -> dict[str, Any]:
  return ocp.tree.to_flat_dict(tree, sep="/")


def _check_structure(
  path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]
) -> None:
  none = "(none)"
  differ = [
    f"{name}: {saved.get(name, none)} -> {wanted.get(name, none)}"
    for name in sorted({**saved, **wanted})
    if saved.get(name) != wanted.get(name)
  ]
  if differ:
    more = len(differ) - _SHOWN
    raise UserError(
      f"checkpoint {path} is of another model or optimizer: "
      + "; ".join(differ[:_SHOWN])
      + (f"; and {more} more" if more > 0 else "")
    )


def _describe(tree: Any) -> dict[str, str]:
  """Returns `(shape) dtype` of every array of a tree, by name."""

  def describe(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{tuple(leaf.shape)} {leaf.dtype}"

  return {name: describe(leaf) for name, leaf in _flat(tree).items()}


def _describe_saved(metadata: Any) -> dict[str, str]:
  if metadata is None:
    raise FileNotFoundError("the list of its arrays cannot be read")
  return _describe(metadata.tree)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _disk_trouble(error: BaseException) -> str | None:
  if isinstance(error, OSError):
    return error.strerror
  words = map(os.strerror, _DISK)
  return next((text for text in words if text in str(error)), None)


def _is_damage(causes: list[BaseException]) -> bool:
  missing = FileNotFoundError
  if any(_disk_trouble(x) for x in causes if not isinstance(x, missing)):
    return False
  found = filter(None, (_STATUS.match(str(error)) for error in causes))
  states = [match[1] for match in found]
  if states:
    return any(state in _DAMAGE for state in states)
  return any(isinstance(error, _DAMAGED) for error in causes)
