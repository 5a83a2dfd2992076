"""Stage 1's objectives, one file each: the loss of a batch, and what its mean runs over.

`stage_loss` (loss.py) is what training calls. Which objectives there are and what each needs stands
in `recipe/objectives.py`, without torch.
"""

from llm2comp.objectives.loss import count_items, stage_loss

__all__ = ["count_items", "stage_loss"]
