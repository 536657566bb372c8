"""What computes attention where, and why."""

import jax
import numpy as np
import pytest

from vlp_jax import sharding
from vlp_jax.ops import attention, masks, tpu_attention

READ, THROUGH = dict(read=True), dict(through=True)
DROPPED = dict(dropped=True)
ARRAY = dict(mask=np.ones((1, 5, 5), bool))
# What is asked for, where, what is special about the place; kernel and reason.
CHOICES = [
  ("auto", "cpu", {}, "xla", "cpu"),
  ("auto", "tpu", {}, "xla", "tpu"),
  ("auto", "gpu", {}, "xla", "gpu"),
  ("auto", "cuda", {}, "cudnn", "cuda"),
  (
    "auto",
    "cuda",
    dict(mask=masks.Mask(np.array([2, 6]), True)),
    "cudnn",
    "cuda",
  ),
  ("auto", "cuda", dict(dtype="float16"), "cudnn", "cuda"),
  ("auto", "cuda", dict(dtype="float32"), "xla", "cudnn takes no float32"),
  ("auto", "cuda", dict(h=12), "xla", "cudnn takes no heads of 12 channels"),
  ("auto", "cuda", dict(h=136), "xla", "cudnn takes no heads of 136 channels"),
  ("auto", "cuda", READ, "xla", "its probabilities are read"),
  ("auto", "cuda", THROUGH, "xla", "its probabilities are perturbed"),
  ("auto", "cuda", DROPPED, "xla", "its probabilities are dropped"),
  ("auto", "cuda", ARRAY, "xla", "its mask is more than causal or lengths"),
  ("xla", "cuda", {}, "xla", "cuda"),
  ("cudnn", "cuda", READ, "xla", "its probabilities are read"),
  ("tpu", "tpu", {}, "tpu", "tpu"),
  ("tpu", "tpu", dict(dtype="float32", h=12), "tpu", "tpu"),
  ("tpu", "tpu", DROPPED, "tpu", "tpu"),
  ("tpu", "tpu", THROUGH, "xla", "its probabilities are perturbed"),
  ("tpu", "tpu", ARRAY, "xla", "its mask is more than causal or lengths"),
  ("tpu", "tpu", dict(t=1025), "xla", "tpu takes no 1025 x 1025 scores"),
  ("tpu", "tpu", dict(n=3), "xla", "the mesh does not divide 4 examples and 3"),
  ("tpu", "tpu", dict(b=3), "xla", "the mesh does not divide 3 examples and 2"),
]


@pytest.mark.parametrize(("asked", "on", "place", "kernel", "reason"), CHOICES)
def test_choices(asked, on, place, kernel, reason):
  place = dict(b=4, t=5, n=2, h=64, dtype="bfloat16") | place
  shape = [place.pop(x) for x in "btnh"]
  q = jax.ShapeDtypeStruct(shape, place.pop("dtype"))
  place = dict(mask=None, dropped=False, through=False, read=False) | place
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((2, 1, 2), sharding.AXES)
  ):
    found = attention.choose(asked, on, q, q, **place)
  assert found.kernel == kernel
  assert found.reason.startswith(reason)


def test_without_a_mesh_several_devices_do_without_the_kernel():
  q = jax.ShapeDtypeStruct((4, 5, 2, 64), "bfloat16")
  assert jax.device_count() > 1
  assert "mesh" in tpu_attention.problem(q, q)
