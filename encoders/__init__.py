"""Pixels and tokens in, unit vectors out: the encoders, and how they are kept and trained."""
