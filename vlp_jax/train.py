"""The loop: build, restore, then batch, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
from ml_collections import ConfigDict

from vlp_jax import checkpoint as checkpoint_lib
from vlp_jax import (
  chips,
  command,
  flops,
  garbage,
  hosts,
  metrics,
  optim,
  profiling,
  sharding,
  skips,
  train_state,
  train_step,
)
from vlp_jax import config as config_lib
from vlp_jax.data import joint, pipeline
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base as evaluators_lib
from vlp_jax.methods import base as methods
from vlp_jax.methods.base import Method, Params
from vlp_jax.ops import attention


def run(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
  """Trains to the end, from where `workdir` stands.

  Args:
    config: of the run; see `config.default_config`.
    workdir: gets config.json, metrics.jsonl, events, checkpoints/, pictures/
      and results.json.

  Returns:
    The final metrics, by flat name.

  Raises:
    UserError: if the config, the data or the folder cannot work; before the
      first step, wherever that can be known.
    Preempted: after SIGTERM, when the state is saved.
  """
  started = time.monotonic()
  parts = joint.configs(config)
  method, *_ = of_streams = build_methods(config, parts)
  workdir = command.make_folder(workdir)
  config_lib.check_same(config, workdir / "config.json")
  mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
  streams = joint.open_streams(parts)
  source = streams[0].source
  tokenizer = tokenizer_lib.get_tokenizer(config, joint.union(streams))
  env = evaluators_lib.Env(config, mesh, tokenizer, workdir)
  evaluators = evaluators_lib.build_all(method, env)
  total_steps = config_lib.num_steps(config, len(source))
  optimizer, schedule = optim.make_optimizer(
    config, total_steps, config_lib.warmup_steps(config, len(source))
  )
  schedule = jax.jit(schedule)  # or its operations are compiled one by one
  if jax.process_index() == 0:
    config_lib.save(config, workdir / "config.json")
    tokenizer_lib.write_atomically(workdir / "tokenizer.model", tokenizer.model)
    for stream in streams:
      tokenizer_lib.warn_cut(tokenizer, stream.source, config)

  create = functools.partial(train_state.of_config, config, method, optimizer)
  abstract = sharding.with_shardings(jax.eval_shape(create), mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  blocks, num_blocks = sharding.host_blocks(mesh)
  checkpoints = checkpoint_lib.Checkpointer(
    workdir / "checkpoints",
    keep=config.checkpoint.keep,
    best_metric=config.checkpoint.best_metric,
  )
  fingerprint = joint.fingerprint(streams, tokenizer)
  fingerprint["accumulate"] = config.accumulate
  last = checkpoints.latest_step()
  hosts.check_same(
    {"config": config.to_json(), "data": fingerprint, "checkpoint": last}
  )
  step_fns = [
    train_step.jit_step(config, one, optimizer, mesh, shardings)
    for one in of_streams
  ]
  state, meta = None, {}
  if last is not None:
    state, meta = checkpoints.restore(abstract)
    check_fingerprint(meta["fingerprint"], fingerprint)
  start = 0 if state is None else int(state.step)  # `last` may be damaged
  announce(method, abstract.params, streams, mesh, start, total_steps)
  if start < total_steps:
    compiling = begin_to_compile(step_fns, abstract, streams, mesh)
  garbage.collect()
  if state is None:
    state = jax.jit(
      create, out_shardings=shardings, compiler_options=runs_once()
    )()
    pictures = functools.partial(pipeline.pictures, source, config)
    state = train_state.start(method, state, shardings, pictures)
  seconds = meta.get("seconds", 0.0)

  writer = metrics.Writer(workdir, start)
  examples = joint.examples_a_step(streams)
  progress = metrics.Progress(
    total_steps, examples, start, **work(of_streams, streams, mesh)
  )
  in_row = skips.SkippedInRow(
    config.optimizer.max_skipped,
    int(skips.skipped(state.opt_state)),
    checkpoints.latest_step,
  )
  batches = joint.JointBatches(
    streams,
    tokenizer,
    start_step=start,
    bad_records=hosts.share(meta.get("bad_records", {}), blocks, num_blocks),
    host=blocks,
    num_hosts=num_blocks,
  )
  pending = None
  latest: dict[str, float] = {}  # of each stream: a log is not of one alone

  def log(finished: tuple[int, str, train_step.Metrics] | None) -> None:
    """Writes the metrics of a step; waits until the device has them."""
    if finished is None:
      return
    step, name, values = finished
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    progress.update(step, values["loss"])
    latest.update({f"{name}/{key}": value for key, value in values.items()})
    if is_due(step, config.log.every_steps, total_steps):
      bad = {k: v for k, v in latest.items() if k.endswith("/bad_records")}
      scalars = latest | hosts.total(bad, blocks)
      # Of the last update that was not skipped: these move the schedule.
      index = step - int(values["skipped"]) - 1
      scalars["train/learning_rate"] = float(schedule(max(index, 0)))
      writer.write(step, scalars | progress.rates())
    in_row.update(step, values["skipped"])

  def save(step: int, scores: dict[str, float] | None = None) -> None:
    spent = seconds + time.monotonic() - started
    meta = {
      "fingerprint": fingerprint,
      "seconds": spent,
      "bad_records": hosts.total(batches.bad_records, blocks),
    }
    checkpoints.save(step, state, meta, scores)

  results: dict[str, float] = {}
  compiled: set[int] = set()
  owed = False  # a checkpoint
  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(hosts.Preemption())
    # However it ends, a save that is under way gets to the disk first.
    stack.enter_context(contextlib.closing(checkpoints))
    stack.enter_context(contextlib.closing(batches))
    stack.enter_context(progress)
    profiler = stack.enter_context(
      profiling.Profiler(config.profile, workdir / "profile", progress.pause)
    )
    for step in range(start + 1, total_steps + 1):
      with progress.waiting():
        number, batch = next(batches)
        batch = sharding.put_batch(batch, mesh)
      first = number not in compiled
      compiled.add(number)
      with progress.pause("compiling") if first else contextlib.nullcontext():
        step_fn = compiling[number].result()
        state, values = profiler.run(step, step_fn, state, batch)
      # Of the step before, so that the device is not waited for; but after the
      # minutes that compiling may take, a step is told as soon as it is done.
      log(pending)
      name = streams[number].name
      pending = step, name, values | {"bad_records": batches.bad_records[name]}
      due = due_evaluators(config, evaluators, step, total_steps)
      stopping = preemption.reached(step - start) and step < total_steps
      # In a row of skipped updates, a checkpoint would be one more of the same
      # parameters, and push out those from before: it is made after the row.
      owed |= is_due(step, config.checkpoint.every_steps, total_steps)
      ending = stopping or step == total_steps
      if first or due or owed or ending:
        log(pending)
        pending = None
      results = {}
      if due:
        try:
          with progress.pause("evaluating"):
            results = evaluate(due, config, state.params, state.ema_params)
        except Exception:
          if step == total_steps and not hosts.several():
            save(step)  # the same command only evaluates, then
          raise
        writer.write(step, results)
      # What is scored is kept as it is: it may be the best.
      scored = config.checkpoint.best_metric in results
      if ending or (owed and (scored or not in_row.is_open)):
        with progress.pause("saving"):
          save(step, results)
        owed = False
      if stopping:
        raise command.Preempted(
          f"preempted: saved step {step} in {workdir}; the same command resumes"
        )
  if start >= total_steps:
    results = evaluate(evaluators, config, state.params, state.ema_params)
  # Not before: matplotlib is no part of the way to the first step.
  from vlp_jax.evaluators import pictures

  pictures.make_pictures(method, state.params, env, workdir)
  writer.close()
  metrics.write_results(
    workdir,
    config=config,
    step=int(state.step),
    params_sha256=metrics.params_sha256(state.params),
    seconds=seconds + time.monotonic() - started,
    metrics=results,
  )
  metrics.print_table(results)
  return results


def runs_once() -> dict[str, Any]:
  """XLA's options for a program that takes longer to compile than to run."""
  if jax.default_backend() != "cpu":
    return {}
  return {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  }


def build_methods(
  config: ConfigDict, parts: Sequence[tuple[str, float, ConfigDict]]
) -> list[Method]:
  """Builds the method once for each stream of batches, and checks the config.

  Args:
    config: of the run.
    parts: what `joint.configs` makes of it.

  Raises:
    UserError: on what cannot work.
  """
  found = []
  for _, _, one in parts:
    method = methods.of_stream(config, one)
    config_lib.validate(one, jax.device_count(), method.match_group)
    found.append(method)
  return found


def work(
  of_streams: Sequence[Method], streams: Sequence[joint.Stream], mesh
) -> dict[str, Any]:
  """What counts the operations of a mean step, and what the mesh could do."""

  def model_flops() -> float:
    return sum(
      stream.share
      * flops.model_flops(method, train_state.batch_spec(stream.config))
      for method, stream in zip(of_streams, streams, strict=True)
    )

  chip = chips.get(mesh.devices.flat[0].device_kind)
  peak = chip and chip.flops * mesh.size
  return {"model_flops": model_flops, "peak_flops": peak}


def is_due(step: int, every_steps: int, total_steps: int) -> bool:
  """Tells whether what happens every N steps (0: at the end) is due."""
  return step == total_steps or (every_steps > 0 and step % every_steps == 0)


def due_evaluators(
  config: ConfigDict, evaluators: dict, step: int, total_steps: int
) -> dict:
  """Returns those evaluators that are to run after a step."""
  return {
    name: evaluator
    for name, evaluator in evaluators.items()
    if is_due(step, config.evals[name].every_steps, total_steps)
  }


def evaluate(
  evaluators: dict,
  config: ConfigDict,
  params: Params,
  ema_params: Params | None,
) -> dict[str, float]:
  """Runs evaluators; metrics are named `<prefix>/<type>/<metric>`."""
  results = {}
  for name, evaluator in evaluators.items():
    fields = config.evals[name]
    average = fields.use_ema and ema_params is not None
    values = evaluator.run(ema_params if average else params)
    prefix = f"{fields.prefix}/{fields.type}"
    results |= {f"{prefix}/{key}": float(v) for key, v in values.items()}
  return results


def check_fingerprint(old: dict, new: dict) -> None:
  """Refuses to resume on other data.

  Raises:
    UserError: naming what differs.
  """
  differ = [
    f"{name}: {old.get(name)} -> {new.get(name)}"
    for name in sorted({**old, **new})
    if old.get(name) != new.get(name)
  ]
  if differ:
    raise UserError(
      f"the checkpoint was trained on other data ({'; '.join(differ)}); give "
      "another --workdir, or the same data to resume"
    )


def announce(
  method: Method,
  params: Params,
  streams: Sequence[joint.Stream],
  mesh,
  start: int,
  total_steps: int,
) -> None:
  """Says what is about to run, in a few lines."""
  if jax.process_index() != 0:
    return
  count = sum(x.size for x in jax.tree.leaves(params))
  shape = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items() if n > 1)
  device = jax.devices()[0].device_kind
  print(
    f"{type(method).__name__}: {count:,} parameters on "
    f"{mesh.size} x {device}{f' ({shape})' if shape else ''}"
  )
  for stream in streams:
    frames = stream.config.data.num_frames
    kind = f"clips of {frames} frames" if frames else "pictures"
    print(
      f"data: {stream.source.name}, {len(stream.source):,} training {kind}, "
      f"{stream.config.batch_size} a step"
      + (f" in {stream.share:.0%} of the steps" if stream.share < 1 else "")
    )
  print(
    f"steps {start + 1:,} to {total_steps:,}"
    if start < total_steps
    else f"already trained for {total_steps:,} steps: evaluating"
  )


def begin_to_compile(
  step_fns: Sequence,
  state: train_state.TrainState,
  streams: Sequence[joint.Stream],
  mesh,
) -> list[futures.Future]:
  """Traces the steps, and has them compiled in a thread, one after another.

  It says what computes attention, and why, in a line for each answer.

  Args:
    step_fns: the jitted step of each stream.
    state: what they take first; shapes and shardings are enough.
    streams: of the batches that they take.
    mesh: the mesh.

  Returns:
    What will be each compiled step.
  """
  rows = jax.NamedSharding(mesh, sharding.BATCH)
  lowered = []
  with attention.choices() as found:
    for step_fn, stream in zip(step_fns, streams, strict=True):
      spec = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in train_state.batch_spec(stream.config).items()
      }
      lowered.append(step_fn.lower(state, spec))
  if jax.process_index() == 0:
    for kernel, reason in found:
      print(f"attention: {kernel} ({reason})")
  pool = futures.ThreadPoolExecutor(1)
  compiling = [pool.submit(one.compile) for one in lowered]
  pool.shutdown(wait=False)  # takes no more; what it has goes on
  return compiling
