"""Measures of dimensional collapse."""
