"""Encoders as folders: exported, verified, compiled, loaded."""
