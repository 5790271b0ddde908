"""Nano backbones and the quickstart."""
