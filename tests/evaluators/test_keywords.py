"""The examples that the evaluator of keywords shows."""

import pytest

from tests.evaluators import fakes
from vlp_jax.evaluators import base


class Tokenizer(fakes.Tokenizer):
  vocab_size = 100

  def decode(self, ids):
    return f"word{int(ids[0])}" if ids else ""


def test_examples_are_shown(capsys):
  source = [
    {
      "image": fakes.picture(i),
      "captions": [f"caption {i}"],
      "image_id": i,
      "objects": [],
    }
    for i in range(6)
  ]
  env = fakes.environment(source, Tokenizer())
  evaluator = fakes.build("keywords", fakes.Speller(), env, examples=3)
  metrics = evaluator.run({})
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4
  assert "'caption 2': word2, word2; adds word3" in lines[2]
  assert "'caption 0': ; adds word2" in lines[1]
  assert metrics == {"chosen": 4 / 3}


def test_without_their_loss_there_are_none():
  env = fakes.environment(fakes.records([["a"]], objects=[[]]), Tokenizer())
  silent = fakes.Speller()
  silent.keyword_weight = 0.0
  with pytest.raises(base.NotApplicableError, match="keyword_weight=0"):
    fakes.build("keywords", silent, env, examples=3)
