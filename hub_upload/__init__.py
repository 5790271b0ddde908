"""Brings a checkpoint folder to the Hub: package, check, push; and shows which code of others' repositories would run."""
