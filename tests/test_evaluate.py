"""What `evaluate` writes, and what it refuses, without a run behind it."""

import json
import types

import pytest

from vlp_jax import config as config_lib
from vlp_jax import evaluate, runs
from vlp_jax.errors import UserError


def _config(*overrides):
  config = config_lib.default_config()
  config.evals = dict(
    val=dict(type="retrieval", split="test", batch_size=8, max_examples=0)
  )
  return config_lib.override(config, overrides)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
  """Evaluates with some arguments: all that is in the files of the folder."""
  config_lib.save(_config(), tmp_path / "config.json")
  results = {}
  monkeypatch.setattr(evaluate.command, "keep_compiled", lambda: None)
  monkeypatch.setattr(evaluate.hosts, "initialize", lambda **_: None)
  run = types.SimpleNamespace(
    step=6, mesh=None, tokenizer=None, method=None, params=None
  )
  monkeypatch.setattr(runs, "open_run", lambda *_, **__: run)
  monkeypatch.setattr(evaluate.evaluators, "build_all", lambda *_: {})
  monkeypatch.setattr(evaluate.train, "evaluate", lambda *_: results)

  def call(values, *args):
    results.clear()
    results.update(values)
    evaluate.main([f"--workdir={tmp_path}", *args])
    return {
      path.name: path.read_text() for path in tmp_path.glob("evaluation*")
    }

  return call


def test_no_evaluation_takes_anothers_file(evaluated, capsys):
  plain = {"eval/retrieval/mir": 0.5}
  (name,) = evaluated(plain)
  assert name == "evaluation_6.json"
  evaluated(plain, "--best", "--config.evals.val.batch_size=4")  # the same
  for number, args in enumerate(
    (
      ["--ema"],
      ["--config.data.name=coco"],
      ["--ema", "--config.data.name=coco"],
      ["--config.data.source=some/My list.jsonl"],
      ["--config.evals.val.split=train"],
      ["--config.tokenizer.max_len=5"],
      ["--config.clips.source=clips.jsonl"],
      ["--config.clips.source=clips.jsonl", "--config.clips.num_frames=1"],
    )
  ):
    files = evaluated({"eval/retrieval/mir": number / 8}, *args)
    assert len(files) == number + 2
  assert json.loads(files[name]) == plain
  assert "evaluation_6_ema.json" in files
  starts = "6_coco_", "6_ema_coco_", "6_My-list_", "6_clips_"
  for start in starts:
    assert any(x.startswith(f"evaluation_{start}") for x in files), start
  assert f"/{name}\n" in capsys.readouterr().out


def test_what_is_not_finite_is_null(evaluated):
  files = evaluated({"a": float("nan"), "b": float("inf"), "c": 1.0})

  def no_constant(name):
    raise ValueError(f"{name} is not JSON")

  (text,) = files.values()
  values = json.loads(text, parse_constant=no_constant)
  assert values == {"a": None, "b": None, "c": 1.0}


@pytest.mark.parametrize(
  "item, says",
  [
    ("tokenizer.max_len=1", "tokenizer.max_len is 1, but must be >= 2"),
    ("evals.val.batch_size=0", "batch_size is 0, but must be >= 1"),
    ("evals.val.max_examples=-1", "max_examples is -1, but must be >= 0"),
  ],
)
def test_numbers_without_a_meaning_are_refused(evaluated, item, says):
  with pytest.raises(UserError, match=says):
    evaluated({}, f"--config.{item}")
