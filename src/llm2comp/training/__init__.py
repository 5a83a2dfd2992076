"""Stages: from a recipe to a trained encoder in a run directory."""
