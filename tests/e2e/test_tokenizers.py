"""Runs with vocabularies of other projects: trained and exported."""

import pytest

from tests.data import tokenizer_reference as reference
from tests.e2e import commands
from vlp_jax.data import tokenizer


@pytest.mark.slow
def test_a_run_with_berts_vocabulary(tmp_path):
  path, pieces = reference.write_bert(tmp_path)
  workdir = tmp_path / "run"
  status, _, err = commands.run(
    "main",
    "--config=configs/clip.py:debug",
    f"--config.tokenizer.path={path}",
    f"--config.tokenizer.vocab_size={len(pieces)}",
    f"--workdir={workdir}",
    *commands.SMALL,
    "--config.total_steps=2",
    "--config.schedule.warmup_steps=1",
    *commands.no_evaluations("configs/clip.py:debug"),
    cwd=tmp_path,
  )
  assert status == 0, err
  path.unlink()  # the run has its own
  kept = tokenizer.Tokenizer((workdir / "tokenizer.model").read_bytes())
  assert kept.vocab_size == len(pieces)
  assert kept.bos_id == pieces.index("[CLS]")
  exported = tmp_path / "exported"
  status, _, err = commands.run(
    "export", f"--workdir={workdir}", f"--output={exported}", cwd=tmp_path
  )
  assert status == 0, err
  assert (exported / "tokenizer.model").read_bytes() == kept.model
