"""Records that an evaluation leaves out: damaged, or without a caption."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.data import sources, warn
from vlp_jax.errors import UserError
from vlp_jax.evaluators import base


class _Damaged(fakes.Source):
  """Records of which one cannot be read."""

  def __getitem__(self, index):
    if self._records[index] is None:
      raise sources.UnreadableRecord(self.describe(index), "cut short")
    return super().__getitem__(index)


@pytest.fixture(autouse=True)
def _nothing_told_yet():
  warn._seen.clear()


def _environment(captions, damaged=(), **annotations):
  records = fakes.records(captions, **annotations)
  env = fakes.environment(records, fakes.Tokenizer("abcdef"))
  for index in damaged:
    records[index] = None
  env._sources["validation"] = _Damaged(records)
  return env


CAPTIONS = [["a"], [], ["", "b"], [" "], ["c"]]


def _params(pictures: int):
  same = np.eye(pictures, 8, dtype=np.float32)
  # Texts are numbered from 1; picture 0 is of "a", 2 of "b", and 4 of "c".
  text = np.zeros((7, 8), np.float32)
  text[[1, 2, 3]] = same[[0, 2, 4]]
  return {"image": same, "text": text, "caption": np.array([1, 0, 2, 0, 3])}


def test_retrieval_leaves_out_what_has_no_caption(capsys):
  env = _environment(CAPTIONS)
  evaluator = fakes.build("retrieval", fakes.Dual(), env)
  metrics = evaluator.run(_params(5))
  assert metrics["i2t_r1"] == metrics["t2i_r1"] == 1
  assert metrics["i2t_median_rank"] == metrics["t2i_median_rank"] == 1
  assert metrics["i2t_r1_chance"] == pytest.approx(1 / 3)
  assert capsys.readouterr().err.splitlines() == [
    "warning: skipped fake[1]: no caption (1 skipped in fake so far)",
    "warning: skipped fake[3]: no caption (2 skipped in fake so far)",
  ]


def test_captioning_leaves_out_what_has_no_caption():
  env = _environment(CAPTIONS)
  evaluator = fakes.build("captioning", fakes.Captioner(), env)
  metrics = evaluator.run(_params(5))
  assert metrics["exact"] == 1 and metrics["exact_chance"] == 0
  assert [x["image_id"] for x in evaluator.samples] == [0, 2, 4]


def test_keywords_leave_out_what_has_no_caption(capsys):
  env = _environment(CAPTIONS)
  evaluator = fakes.build("keywords", fakes.Speller(), env, examples=3)
  evaluator._words = str
  evaluator.run({})
  shown = capsys.readouterr().out.splitlines()[1:]
  assert [line.split(":")[0] for line in shown] == ["  'a'", "  'b'", "  'c'"]


def test_labels_need_no_caption():
  env = _environment(CAPTIONS, label=["x", "y", "x", "y", "x"])
  assert len(fakes.build("zeroshot", fakes.Dual(), env).records) == 5


def test_damaged_records_are_left_out(capsys):
  env = _environment([["a"], ["e"], ["b"], ["f"], ["c"]], damaged=(1, 3))
  for kind in ("retrieval", "captioning"):
    evaluator = fakes.build(kind, fakes.Captioner(), env)
    metrics = evaluator.run(_params(5))
    assert metrics["i2t_r1" if kind == "retrieval" else "exact"] == 1
  told = capsys.readouterr().err.splitlines()
  assert told[0] == (
    "warning: skipped fake[1]: record cannot be read (cut short) "
    "(1 skipped in fake so far)"
  )
  assert len(told) == 2


def test_embeddings_of_other_records_are_others():
  env = _environment(
    [["a"], [], ["b"], [], ["c"]], label=["a", "a", "b", "b", "c"]
  )
  method, params = fakes.Dual(), _params(5)
  shown = fakes.build("retrieval", method, env).encode_images(params)
  every = fakes.build("zeroshot", method, env).encode_images(params)
  assert len(shown) == 3 and len(every) == 5


@pytest.mark.parametrize(
  "env, says",
  [
    (_environment([[], [""]]), "no record of 'fake' is readable and has a cap"),
    (_environment([["a"], ["b"]], damaged=(0, 1)), "no record of 'fake' is re"),
  ],
)
def test_without_usable_records_there_is_no_evaluation(env, says):
  with pytest.raises(base.NotApplicableError, match=says):
    fakes.build("retrieval", fakes.Dual(), env)


@pytest.mark.parametrize(
  "label", [{"id": 3}, float("nan"), float("inf"), 2.5, [[1]], b"\xff"]
)
def test_an_odd_label_is_named(label):
  env = _environment([["a"], ["b"]], label=["x", label])
  with pytest.raises(UserError, match=r"fake\[1\] has .*number$") as found:
    fakes.build("zeroshot", fakes.Dual(), env, classes=("x",))
  assert found.type is UserError
  # Training does not end of an evaluation that nobody has asked for.
  with pytest.raises(base.NotApplicableError, match="has the label"):
    fakes.build("zeroshot", fakes.Dual(), env)


@pytest.mark.parametrize("label", ["", -1, None, np.int64(-1), [], b""])
def test_what_is_no_label(label):
  env = _environment([["a"], ["b"]], label=["x", label])
  assert fakes.build("zeroshot", fakes.Dual(), env)._places == [0]


def test_decoding_skips_ids_that_the_tokenizer_lacks():
  class Small:
    vocab_size = 4

    def decode(self, ids):
      assert all(i < 4 for i in ids)
      return " ".join(map(str, ids))

  assert base.decode(Small(), [2, 3, 4, 1, 99]) == "2 3 1"
