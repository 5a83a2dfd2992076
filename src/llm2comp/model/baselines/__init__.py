"""Encoders that need no training, to compare with: kinds.py (no torch), prompts.py, module.py."""
