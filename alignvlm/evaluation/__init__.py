"""Answers of models, the metrics that judge them, and results."""
