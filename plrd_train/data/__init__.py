"""Corpus -> documents -> tokens -> batches at a global position."""
