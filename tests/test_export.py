"""What an export says of itself, and what is made of it."""

import json
import types

import numpy as np
import pytest

from vlp_jax import config as config_lib
from vlp_jax import export, pretrained
from vlp_jax.errors import UserError


@pytest.mark.parametrize(
  "resize, says", [("crop", "centre crop"), ("stretch", "nothing is cut off")]
)
def test_preprocessing_is_that_of_the_run(tmp_path, resize, says):
  config = config_lib.default_config()
  config.data.update(eval_resize=resize, image_size=48, num_frames=4)
  tokenizer = types.SimpleNamespace(model=b"model")
  run = types.SimpleNamespace(config=config, tokenizer=tokenizer, step=6)
  export._describe(run, tmp_path)
  found = json.loads((tmp_path / "preprocessing.json").read_text())
  assert found["eval_resize"] == resize and says in found["resize"]
  assert found["image_size"] == 48 and found["num_frames"] == 4
  assert "clips" not in found
  config.data.num_frames = 0
  config.clips.update(name="scenes_video", num_frames=3)
  export._describe(run, tmp_path)
  found = json.loads((tmp_path / "preprocessing.json").read_text())
  assert found["num_frames"] == 0
  assert found["clips"] == {"image_size": 48, "num_frames": 3}


def test_a_resize_that_is_none_is_refused(tmp_path):
  config = config_lib.default_config()
  config.data.eval_resize = "fit"
  with pytest.raises(UserError, match="eval_resize='fit' is unknown"):
    export.export(types.SimpleNamespace(config=config), tmp_path / "export")


def test_captions_of_a_model_with_more_ids_than_the_tokenizer():
  class Tokenizer:
    vocab_size, bos_id, eos_id = 4, 2, 3

    def decode(self, ids):
      assert all(i < self.vocab_size for i in ids)  # as sentencepiece does
      return " ".join(map(str, ids))

  class Method:
    def generate(self, params, batch, max_len, bos_id, eos_id):
      return np.array([[2, 1, 7, 3]] * len(batch["image"]))

  config = config_lib.default_config()
  model = pretrained.Pretrained(config, Method(), {}, Tokenizer())
  picture = np.zeros((64, 64, 3), np.uint8)
  assert model.caption([picture]) == ["2 1 3"]
