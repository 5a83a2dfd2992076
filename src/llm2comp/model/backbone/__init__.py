"""The only place that knows transformers' models and peft: a frozen LM and its adapters.

One copy of the weights serves three passes:
1. `encoder_pass`: adapters on, bidirectional by `is_causal=False` per call (no modelling code of
   our own)
2. teacher: `decoder_pass`: adapters off, causal; bit for bit the untouched LM
3. decoder: `decoder_pass` on memory states: the same, with gradients to its input

families.py: what differs between model families, as tables · trainable.py: what learns in a stage ·
model.py: the passes · probes.py: trials of a model · loading.py: from a name to a probed Backbone ·
digest.py: which weights these are.
"""

from llm2comp.model.backbone.adapters import AdapterStack
from llm2comp.model.backbone.digest import Base, check_base, hub_commit, weights_digest
from llm2comp.model.backbone.loading import base_licence, licence_in, load_backbone, resolve_device
from llm2comp.model.backbone.model import KINDS, Backbone
from llm2comp.model.backbone.probes import probe
from llm2comp.model.backbone.trainable import Trainable

__all__ = [
    "KINDS",
    "AdapterStack",
    "Backbone",
    "Base",
    "Trainable",
    "base_licence",
    "licence_in",
    "check_base",
    "hub_commit",
    "load_backbone",
    "probe",
    "resolve_device",
    "weights_digest",
]
