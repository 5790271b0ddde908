"""Commands to look at data and models, and to plan."""
