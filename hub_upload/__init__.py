"""From a checkpoint folder to a repository on the Hub: package, check, push; and a look at what others' repositories would run."""
