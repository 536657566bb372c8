"""Motion: which way time runs.

'a red circle moves left' against 'a red circle moves right', of a clip whose
middle frame shows neither (`data/motion_generate.py`).
"""

from vlp_jax.evaluators import _probe


class Evaluator(_probe.Probe):
  """What `Probe` measures, on the records' `motion` pairs."""

  annotations = ("motion",)
  one_frame = 0.5  # clips come in twins, of which either text is true of one
