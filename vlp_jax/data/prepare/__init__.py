"""Turns any source of pictures and captions into a TFDS data set."""
