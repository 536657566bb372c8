"""Pure functions on arrays: values an example, to be averaged by the step."""
