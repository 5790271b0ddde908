"""Answers, metrics and the numbers made of them."""
