"""Own documents, no labels → an encoder for them, and whether to use it.

corpus.py    documents → held-out tasks, pairs to train on, their files in the run
questions.py questions that the LM writes about passages, kept if they find them
planning.py  minutes → so many steps, by the measured cost of one; the recipe
verdict.py   BM25, encoders, hybrids on the held-out task → a table, one sentence
running.py   all of it, in order
"""

from llm2comp.lab.adapt.running import adapt

__all__ = ["adapt"]
