"""`python -m vlp_jax.data.tokenizer`."""

import pytest

from tests.e2e import commands
from vlp_jax.data import sources, tokenizer, train_tokenizer
from vlp_jax.errors import UserError


def test_beside_the_data_where_training_looks(jsonl_config, capsys):
  path = jsonl_config.data.source
  train_tokenizer.main([f"--source={path}", "--vocab_size=60"])
  first, second = capsys.readouterr().out.splitlines()
  kept = second.split()[0].removeprefix("--config.tokenizer.path=")
  assert "pieces from" in first and first.endswith(kept)
  jsonl_config.tokenizer.vocab_size = 60
  source = sources.open_source(jsonl_config.data, "train")
  made, where = tokenizer.trained_once(source, 60)
  assert str(where) == kept
  assert tokenizer.get_tokenizer(jsonl_config).sha256 == made.sha256
  for field in second.split()[1:]:
    assert field == f"--config.tokenizer.vocab_size={made.vocab_size}"


def test_a_tfds_data_set_and_an_output(toy_tfds, config, tmp_path, capsys):
  output = tmp_path / "new" / "toy.model"
  train_tokenizer.main(["--name=toy", "--vocab_size=80", f"--output={output}"])
  config.tokenizer.path = str(output)
  made = tokenizer.get_tokenizer(config)
  assert made.vocab_size <= 80
  assert f"{made.vocab_size} pieces from toy/1.0.0:train" in (
    capsys.readouterr().out
  )


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "give --name=NAME or --source=FILE.jsonl"),
    (["--name=a", "--source=b.jsonl"], "give --name=NAME or"),
    (["--name=no_such_data"], "no_such_data"),
    (["--name=toy", "--vocab_size=0"], "--vocab_size=0 is not positive"),
    (["--name=toy", "--vocab_size=9"], "too small"),
    (["--name=toy", "--split=nope"], "nope"),
    (["--name=toy", "--config.seed=1"], "takes no --config"),
    (["--nome=toy"], "--name"),
  ],
)
def test_mistakes(argv, message, toy_tfds, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(UserError) as error:
    train_tokenizer.main(argv)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command(tmp_path, jsonl_config):
  status, out, err = commands.run(
    "data.tokenizer",
    f"--source={jsonl_config.data.source}",
    "--vocab_size=50",
    f"--output={tmp_path / 'a.model'}",
    cwd=tmp_path,
  )
  assert status == 0 and "pieces from" in out, err
  assert (tmp_path / "a.model").is_file()
  status, _, err = commands.run("data.tokenizer", cwd=tmp_path)
  commands.assert_one_line(status, err, "--name=NAME")
