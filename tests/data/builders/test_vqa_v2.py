import json
import pathlib

import pytest

from tests.data.builders import toy
from vlp_jax.data.builders import vqa_answers


@pytest.mark.parametrize(
  ("answer", "normal"),
  [
    ("Yes.", "yes"),
    ("the Dog", "dog"),
    ("two", "2"),
    ("none", "0"),
    ("1,000", "1000"),
    ("3.5 feet.", "3.5 feet"),
    ("t-shirt", "t shirt"),
    ("red , blue", "red blue"),
    ("left/right", "left right"),
    ("dont know", "don't know"),
    ("couldnt've", "couldn't've"),
    ("yall'd've", "y'all'd've"),
    ("somebody'd", "somebodyd"),  # as in the official table
    (" U.S.A\n", "usa"),
    ("(on) top!", "on top"),
    ("a", ""),
  ],
)
def test_answers_are_normalised(answer, normal):
  assert vqa_answers.normalise(answer) == normal


def test_the_vocabulary_is_of_frequent_answers_in_their_first_order():
  answers = ["no"] * 9 + ["Yes"] * 5 + ["cat"] * 8 + ["yes."] * 4
  assert vqa_answers.vocabulary(answers) == ["no", "yes"]


def test_soft_scores():
  labels = {"cat": 0, "dog": 1, "2": 2, "red": 3}
  answers = ["dog"] * 4 + ["cat", "a cat", "the cat"] + ["two", "2", "bird"]
  assert vqa_answers.soft_scores(answers, labels) == (
    [1, 0, 2],
    [1.0, 0.9, 0.6],
  )
  assert vqa_answers.soft_scores(["cat"], labels) == ([0], [0.3])
  assert vqa_answers.soft_scores([], labels) == ([], [])


def _put(manual, part, answers, with_annotations=True):
  """Writes a part with one question for each majority answer."""
  about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco"}
  about |= {"license": {}, "data_subtype": part}
  questions = [
    {"image_id": 9, "question": f"What is {i}?", "question_id": 9000 + i}
    for i in range(len(answers))
  ]
  toy.put(
    manual / f"v2_OpenEnded_mscoco_{part}_questions.json",
    {**about, "questions": questions},
  )
  if with_annotations:
    annotations = [
      {
        "question_type": "what is",
        "multiple_choice_answer": answer,
        "answers": [
          {
            "answer": answer if k < 7 else "oak",
            "answer_confidence": "yes",
            "answer_id": k + 1,
          }
          for k in range(10)
        ],
        "image_id": 9,
        "answer_type": "other",
        "question_id": 9000 + i,
      }
      for i, answer in enumerate(answers)
    ]
    toy.put(
      manual / f"v2_mscoco_{part}_annotations.json",
      {**about, "annotations": annotations[: len(answers)]},
    )
  toy.put(manual / f"{part}/COCO_{part}_{9:012d}.jpg", toy.picture(9))


@pytest.fixture
def manual(tmp_path):
  folder = tmp_path / "manual"
  _put(folder, "train2014", ["oak"] * 9 + ["rare"])
  _put(folder, "val2014", ["elm"] * 9)
  return folder


def test_questions(manual, tmp_path):
  builder = toy.make("vqa_v2", tmp_path)
  assert toy.sizes(builder) == {"train": 10, "validation": 9}
  path = pathlib.Path(builder.data_dir, "answers.json")
  assert json.loads(path.read_text()) == ["oak", "elm"]
  train = {r["question_id"]: r for r in toy.read(builder)}
  assert train[9003]["image"] == toy.picture(9)
  assert train[9003]["image_id"] == 9
  assert train[9003]["question"] == "What is 3?"
  assert train[9003]["answers"] == ["oak"] * 10
  assert (train[9003]["labels"], train[9003]["scores"]) == ([0], [1.0])
  assert train[9009]["answers"] == ["rare"] * 7 + ["oak"] * 3
  assert train[9009]["labels"] == [0]
  assert train[9009]["scores"] == pytest.approx([0.9])
  assert toy.read(builder, "validation")[0]["labels"] == [1, 0]


def test_the_test_set_has_no_answers(manual, tmp_path):
  _put(manual, "test2015", [""] * 2, with_annotations=False)
  builder = toy.make("vqa_v2", tmp_path)
  record = toy.read(builder, "test")[0]
  assert toy.sizes(builder)["test"] == 2
  assert record["answers"] == record["labels"] == record["scores"] == []


def test_bad_questions_are_skipped(manual, tmp_path):
  path = manual / "v2_OpenEnded_mscoco_train2014_questions.json"
  content = json.loads(path.read_text())
  content["questions"] += [
    {"image_id": 9, "question": "Who?", "question_id": 1},
    {"image_id": 10, "question": "Who?", "question_id": 9000},
    {"image_id": 9, "question_id": 9001},
  ]
  content["questions"] = content["questions"][2:]
  toy.put(path, content)
  builder = toy.make("vqa_v2", tmp_path)
  assert toy.sizes(builder)["train"] == 8
  assert toy.skipped(builder) == {
    "no annotation": ["question 1"],
    "missing file": ["question 9000"],
    "no 'question'": ["question 9001"],
  }


def test_missing_files_are_named(tmp_path):
  message = toy.missing("vqa_v2", tmp_path)
  name = "v2_OpenEnded_mscoco_val2014_questions.json"
  assert f"missing {tmp_path}/manual/{name}, from https://visualqa" in message
