"""Code shared by the evaluation scripts."""
