"""Evaluating encoders with mteb, local sets and BM25."""
