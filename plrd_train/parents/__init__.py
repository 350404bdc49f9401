"""Hugging Face in and out: parents, members, and what lies in their folders."""
