"""Configs: loading, overriding, checking, comparing; and the command line."""

import json
import pathlib

import pytest

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.flags import parse_flags

_FILE = '''"""A config for tests."""
from vlp_jax import config as config_lib

def get_config(size="tiny"):
  c = config_lib.default_config()
  c.total_steps = 10
  c.model = dict(attention="auto",
                 image=dict(width=64, num_heads=4, patch_size=8),
                 text=dict(width=64, num_heads=4, max_len=32))
  c.evals = dict(val=dict(type="retrieval", every_steps=100, batch_size=8,
                          max_examples=0))
  c.update_from_flattened_dict(
    config_lib.choose(size, {"tiny": {}, "debug": {"total_steps": 2}}))
  return c
'''


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "toy.py"
  path.write_text(_FILE)
  return str(path)


def test_sizes(file):
  assert config_lib.load(file).total_steps == 10
  assert config_lib.load(f"{file}:debug").total_steps == 2
  with pytest.raises(UserError, match=r"'huge'; the sizes are tiny, debug"):
    config_lib.load(f"{file}:huge")
  assert config_lib.name_of("configs/coca.py") == "coca"
  assert config_lib.name_of("configs/coca.py:debug") == "coca_debug"


def test_overrides_have_the_type_of_the_field(file):
  config = config_lib.load(
    file,
    [
      "batch_size=8",
      "optimizer.learning_rate=1",
      "optimizer.name=lion",
      "data.crop_scale=(0.5,1)",
      "data.source=a=b.jsonl",
      'data.mix={"a": 0.5, "b/c.jsonl": 0.5}',
      "data.flip=1",
      "data.clean_captions=true",
      "evals.val.every_steps=7",
      "model.text.width=32",
    ],
  )
  assert config.batch_size == 8
  assert config.optimizer.learning_rate == 1.0
  assert isinstance(config.optimizer.learning_rate, float)
  assert config.optimizer.name == "lion"
  assert config.data.crop_scale == (0.5, 1.0)
  assert config.data.source == "a=b.jsonl"
  assert config.data.mix == '{"a": 0.5, "b/c.jsonl": 0.5}'
  assert config.data.flip == 1.0 and config.data.clean_captions is True
  assert config.evals.val.every_steps == 7
  assert config.model.text.width == 32
  assert config.is_locked


@pytest.mark.parametrize(
  "item, says",
  [
    ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate"),
    ("learning_rate=1", "did you mean optimizer.learning_rate"),
    ("evals.val.evry_steps=1", "did you mean evals.val.every_steps"),
    ("schedule=cosine", "its fields are schedule.end_factor, schedule.name"),
    ("batch_size=8.0", r"of type int \(now 64\); '8.0' is not"),
    ("batch_size=many", "of type int"),
    ("batch_size", "lacks a value"),
    ("optimizer.learning_rate=nan", "of type float"),
    ("data.crop_scale=(a,b)", "of type tuple of float"),
    ("data.crop_scale=(", "of type tuple of float"),
    ("data.flip=yes", "of type float"),
    ("data.clean_captions=maybe", "of type bool"),
    ("data.max_words=1.5", "of type int"),
  ],
)
def test_bad_overrides_are_refused(file, item, says):
  with pytest.raises(UserError, match=says) as error:
    config_lib.load(file, [item])
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["data", "clips"])
def test_data_that_are_named_take_the_place_of_a_source(file, section):
  trained = config_lib.load(file, [f"{section}.source=mine.jsonl"])
  name, source = f"{section}.name=coco", f"{section}.source=other.jsonl"
  for items, expected in (
    ([name], ("coco", "")),
    ([name, source], ("coco", "other.jsonl")),
    ([source], (trained[section].name, "other.jsonl")),
    (["seed=1"], (trained[section].name, "mine.jsonl")),
  ):
    config = config_lib.from_json(config_lib.to_json(trained))
    found = config_lib.override(config, items)[section]
    assert (found.name, found.source) == expected


def test_files_are_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(config_lib, "_PACKAGE", tmp_path / "repo" / "vlp_jax")
  beside = tmp_path / "repo" / "configs" / "coca.py"
  inside = tmp_path / "repo" / "vlp_jax" / "configs" / "scl.py"
  for path in (beside, inside):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_FILE)
  monkeypatch.chdir("/")
  assert config_lib.find("configs/coca.py") == beside
  assert config_lib.find("configs/scl.py") == inside
  with pytest.raises(UserError, match=r"did you mean configs/coca\.py"):
    config_lib.find("configs/cocoa.py")


@pytest.mark.parametrize(
  "text, says",
  [
    ("def get_config(:", "line 1: SyntaxError"),
    ("\nimport no_such_module", "line 2: ModuleNotFoundError"),
    ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError"),
    ("x = 1", "get_config"),
  ],
)
def test_broken_files_are_named_by_line(tmp_path, text, says):
  path = tmp_path / "broken.py"
  path.write_text(text)
  with pytest.raises(UserError, match=says):
    config_lib.load(str(path))


def test_command_line(file, capsys):
  config, values = config_lib.parse_command_line(
    [f"--config={file}", "--config.batch_size", "16", "--workdir=/w"],
    {"workdir": "", "verbose": False},
    "usage",
  )
  assert config.batch_size == 16
  assert values == {"config": file, "workdir": "/w", "verbose": False}
  with pytest.raises(SystemExit) as stop:
    config_lib.parse_command_line([f"--config={file}", "--help"], {}, "Usage.")
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert out.startswith("Usage.")
  assert "A config for tests." in out
  assert "--config.optimizer.learning_rate=0.001" in out


@pytest.mark.parametrize(
  "arguments, says",
  [
    ([], "--config=FILE"),
    (["--wrkdir=x"], "no flag --wrkdir; did you mean --workdir"),
    (["train"], "not of the form"),
    (["--workdir"], "lacks a value"),
    (["--steps=1.5"], "of type int"),
  ],
)
def test_bad_command_lines_are_refused(arguments, says):
  with pytest.raises(UserError, match=says):
    config_lib.parse_command_line(arguments, {"workdir": "", "steps": 1}, "")


def test_bool_flags():
  flags = {"dry_run": False, "steps": 0}
  assert parse_flags(["--dry_run", "--steps=2"], flags) == (
    {"dry_run": True, "steps": 2},
    [],
  )
  values, _ = parse_flags(["--dry_run=false"], {"dry_run": True})
  assert values == {"dry_run": False}


def test_lengths():
  config = config_lib.default_config()
  config.batch_size = 10
  config.total_epochs = 2.5
  config.schedule.warmup_examples = 25
  assert config_lib.num_steps(config, num_examples=101) == 26
  assert config_lib.warmup_steps(config, num_examples=101) == 3
  config.total_steps = 7
  assert config_lib.num_steps(config, num_examples=101) == 7


def test_mesh_shape():
  config = config_lib.default_config()
  assert config_lib.mesh_shape(config, 8) == (8, 1, 1)
  config.mesh.fsdp = 4
  assert config_lib.mesh_shape(config, 8) == (2, 4, 1)
  with pytest.raises(UserError, match="does not make 6 devices"):
    config_lib.mesh_shape(config, 6)
  config.mesh.tensor = -1
  with pytest.raises(UserError, match="does not make 8 devices"):
    config_lib.mesh_shape(config, 8)


@pytest.mark.parametrize(
  "item, says",
  [
    ("batch_size=60", "no multiple of 64 = data 8 .* match group 4.* is 64"),
    ("batch_size=0", "batch_size is 0, but must be >= 1"),
    ("total_steps=0", r"exactly one of .*\(set: none\)"),
    ("total_steps=-1", "total_steps is -1"),
    ("optimizer.b2=1.0", r"optimizer.b2 is 1.0, not in \[0, 1\)"),
    ("cpu_optimization_level=4", "level is 4, but must be 0 to 3"),
    ("cpu_optimization_level=-1", "level is -1, but must be >= 0"),
    ("mesh.data=3", "does not make 8 devices"),
    ("profile=15:10", "profile is '15:10', but must be FIRST:LAST"),
    ("model.image.num_heads=5", "image.width=64 is not a multiple of"),
    ("model.image.patch_size=7", "image_size=64 is not a multiple of"),
    ("tokenizer.max_len=64", "max_len=64 exceeds config.model.text.max_len"),
    ("tokenizer.max_len=1", "tokenizer.max_len is 1, but must be >= 2"),
    ("evals.val.batch_size=0", "evals.val.batch_size is 0, but must be >= 1"),
    ("evals.val.max_examples=-1", "max_examples is -1, but must be >= 0"),
  ],
)
def test_impossible_configs_are_refused(file, item, says):
  base = ["accumulate=2", "batch_size=128"]
  good = config_lib.load(file, base)
  config_lib.validate(good, num_devices=8, match_group=4)
  with pytest.raises(UserError, match=says):
    bad = config_lib.load(file, [*base, item])
    config_lib.validate(bad, num_devices=8, match_group=4)


def test_json_round_trip(file):
  config = config_lib.load(file)
  again = config_lib.from_json(config_lib.to_json(config))
  assert again == config
  assert isinstance(again.data.crop_scale, tuple)
  assert isinstance(again.schedule.end_factor, float)
  assert config_lib.diff(config, again) == []


def test_configs_of_before_a_field_was_there(file):
  """They have its default, under which nothing changes."""
  config = config_lib.load(file, ["data.augment=crop"])
  older = json.loads(config_lib.to_json(config))
  fields = ("mix", "flip", "num_frames", "eval_resize", "clean_captions")
  for field in (*fields, "max_bad"):
    del older["data"][field]
  for field in ("start_factor", "stairs", "warmup_stairs"):
    del older["schedule"][field]
  del older["profile"]
  del older["cpu_optimization_level"]
  del older["model"]["attention"]
  again = config_lib.from_json(json.dumps(older))
  assert config_lib.diff(config, again) == []
  assert again.is_locked


def test_resume_needs_the_same_config(file, tmp_path):
  path = tmp_path / "config.json"
  config_lib.check_same(config_lib.load(file), path)  # nothing there yet
  config_lib.save(config_lib.load(file), path)
  free = ["log.every_steps=1", "data.num_workers=2", "mesh.fsdp=2"]
  free += ["data.max_bad=0.5", "optimizer.max_skipped=9", "profile=2:3"]
  config_lib.check_same(config_lib.load(file, free), path)
  with pytest.raises(UserError, match="seed: 0 -> 1; total_steps: 10 -> 20"):
    config_lib.check_same(
      config_lib.load(file, ["total_steps=20", "seed=1"]), path
    )
  constant = ["schedule.name=constant"]
  config_lib.save(config_lib.load(file, constant), path)
  longer = config_lib.load(file, [*constant, "total_steps=20"])
  config_lib.check_same(longer, path)
  assert [p.name for p in pathlib.Path(tmp_path).glob("config*")] == [
    "config.json"
  ]


def test_a_config_file_may_write_the_mix_as_a_dict(tmp_path):
  path = tmp_path / "mixed.py"
  path.write_text(
    "from vlp_jax.config import default_config\n"
    "def get_config():\n"
    "  config = default_config()\n"
    '  config.data.mix = {"cc12m": 0.7, "coco.jsonl": 0.3}\n'
    "  return config\n"
  )
  config = config_lib.load(str(path))
  assert config.data.mix == '{"cc12m": 0.7, "coco.jsonl": 0.3}'
  again = config_lib.from_json(config_lib.to_json(config))
  assert again.data.mix == config.data.mix
