"""Hugging Face models: finding, checking and reading parents and members."""
