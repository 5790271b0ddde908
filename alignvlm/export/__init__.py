"""A checkpoint to other programs: which can take it, and the files they read."""
