"""The only place that knows transformers' models and peft: a frozen causal LM with a stack of adapters.

One copy of the weights serves three passes:
1. encoder pass `read`: adapters on, bidirectional by `is_causal=False` per call (no modelling code of our own)
2. teacher pass `decode`: adapters off, causal; bit for bit the untouched LM
3. decoder pass `decode` on memory states: the same, with gradients to its input

families.py: what differs between model families, as tables · adapters.py: the stack · model.py: the passes ·
loading.py: from a name to a probed Backbone · digest.py: which weights these are.
"""

from llm2comp.backbone.adapters import AdapterStack
from llm2comp.backbone.digest import Base, check_base, hub_commit, weights_digest
from llm2comp.backbone.loading import base_licence, load_backbone, probe, resolve_device
from llm2comp.backbone.model import Backbone

__all__ = [
    "AdapterStack",
    "Backbone",
    "Base",
    "base_licence",
    "check_base",
    "hub_commit",
    "load_backbone",
    "probe",
    "resolve_device",
    "weights_digest",
]
