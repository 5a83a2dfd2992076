"""Judging encoders: evaluate, analyze, study, report, the demonstration."""
