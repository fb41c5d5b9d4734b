"""Runs a script: options, launch, the run directory, its log and checkpoints."""
