"""Speed and memory against the release's shape, stock peers and the machine's own limit: `make
bench`, docs/benchmarks.md.

settings.py: all sizes, in one place · inputs.py: random LM, tokenizer, texts · release_shaped.py:
our code with the release's cost structure · work.py: FLOP formulas and the measured GEMM rate ·
training.py, encoding.py, parts.py: rows, each with the sides it compares · worker.py: one
measurement in one fresh process · table.py: results → table, targets · __main__.py: all.
"""
