"""The quickstart and its nano backbones."""
