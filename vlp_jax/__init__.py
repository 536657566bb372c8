"""Vision-language pretraining in JAX: SyCoCa, SIMLA, SCL, CoCa, ALBEF, CLIP.

Train with `python -m vlp_jax.main`, export with `python -m vlp_jax.export`,
and use the result with `vlp_jax.load`.
"""

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str):
  # JAX is imported when it is needed: commands set up devices before.
  if name == "load":
    from vlp_jax.pretrained import load

    return load
  raise AttributeError(f"module 'vlp_jax' has no attribute {name!r}")
