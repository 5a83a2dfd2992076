"""Encoders that need no training, to compare with: settings.py (no torch), prompts.py,
encoder.py.
"""
