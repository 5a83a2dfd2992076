"""The LM's own response to a text from memory: LLM2Vec-Gen's first loss (arXiv 2603.10913).

It is `continuation` on data with responses, where the response is all of a text's continuation. Its
second loss is `alignment`.
"""

from llm2comp.objectives.continuation import loss, positions

__all__ = ["loss", "positions"]
