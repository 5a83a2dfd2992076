"""The stack of LoRA adapters over a frozen LM.

Each stage adds one adapter; older ones stay active but frozen and without dropout. LoRA deltas add, so the stack equals
the release's merge-and-renew while the base itself is never modified (DESIGN 1.2).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2comp.backbone.families import lora_targets
from llm2comp.errors import BackboneError
from llm2comp.recipe import AdapterSettings


class AdapterStack:
    """Named adapters over one LM, oldest first. Not a Module: the LM owns the weights."""

    def __init__(self, lm: Any, model_name: str) -> None:
        self.lm = lm
        self.model_name = model_name
        self.names: list[str] = []
        self._peft: Any = None
        self._layers: list[Any] = []

    def add(self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0) -> None:
        """Put one more adapter on top; of all weights of the LM it alone learns from here on.

        Raises:
            BackboneError: the targets match no module of this model.
        """
        config = self._config(settings, settings.dropout if dropout is None else dropout)
        if isinstance(settings.targets, tuple) and (unknown := self._unmatched(settings.targets)) is not None:
            raise self._no_target(unknown)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft speaks up for GPT-2's Conv1D and for a second adapter
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = peft.get_peft_model(self.lm, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise self._no_target(config.target_modules) from error
        self.names.append(name)
        self._layers = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        self._peft.base_model.set_adapter(self.names)
        self.lm.requires_grad_(False)
        for parameter in self.parameters(name):
            parameter.requires_grad_(True)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """LoRA weights of one adapter."""
        return [p for n, p in self.lm.named_parameters() if "lora_" in n and f".{name}." in n]

    @contextlib.contextmanager
    def switched(self, off: bool) -> Iterator[None]:
        """All adapters off (or on) inside.

        Flips the flag that peft's `disable_adapter()` flips, without its walk over the model and without touching
        `requires_grad`; a test holds the two against each other.
        """
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = off
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer._disable_adapters = value

    @property
    def off(self) -> bool:
        """Whether the adapters are switched off at this moment."""
        return bool(self._layers) and bool(self._layers[0]._disable_adapters)

    def train_dropout(self, on: bool) -> None:
        """Dropout of the newest adapter; older ones never have any."""
        for layer in self._layers:
            for name, module in layer.lora_dropout.items():
                module.train(on and name == self.names[-1])

    def save(self, name: str, folder: Path) -> None:
        """Write one adapter in peft's own format (adapter_config.json, adapter_model.safetensors)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._state(name), folder / "adapter_model.safetensors")
        config = copy.copy(self._peft.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def load(self, name: str, folder: Path) -> None:
        """Fill an adapter of the stack with the weights that `save` wrote."""
        tensors = load_file(folder / "adapter_model.safetensors")
        state = self._state(name)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in state.items()}:
            raise BackboneError("adapter weights do not fit this model and these settings", where=str(folder))
        peft.set_peft_model_state_dict(self._peft, tensors, adapter_name=name)

    def merged(self) -> Any:
        """A copy of the LM with all adapters in its weights: W + Σ scale·B·A in float32, then the base's dtype (DESIGN 1.7)."""
        lm = copy.deepcopy(self.lm)
        for path, module in list(lm.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                base = layer.get_base_layer()
                weight = base.weight.data.float()
                for name in self.names:
                    weight = weight + layer.get_delta_weight(name).float()
                base.weight.data = weight.to(base.weight.dtype)
                lm.set_submodule(path, base)
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            lm.__dict__.pop(leftover, None)
        return lm

    def _state(self, name: str) -> dict[str, Tensor]:
        state = peft.get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}

    def _config(self, settings: AdapterSettings, dropout: float) -> Any:
        targets: Any = settings.targets
        if targets == "default":
            targets = lora_targets(self.lm.config.model_type)
        return peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets if targets == "all-linear" else list(targets),
            base_model_name_or_path=self.model_name,
        )

    def _unmatched(self, targets: tuple[str, ...]) -> list[str] | None:
        """Those of the named targets that are no module of this model; None if all are some."""
        modules = [f".{path}" for path, _ in self.lm.named_modules()]
        unmatched = [name for name in targets if not any(path.endswith(f".{name}") for path in modules)]
        return unmatched if unmatched or not targets else None

    def _no_target(self, targets: Any) -> BackboneError:
        linear = {n.rsplit(".", 1)[-1] for n, m in self.lm.named_modules() if isinstance(m, nn.Linear)}
        return BackboneError(
            "LoRA targets match no module",
            where=f"{self.model_name} (model_type {self.lm.config.model_type})",
            expected=f"some of {', '.join(sorted(linear))}",
            found=", ".join(sorted(targets)) or "none",
            fix="set adapter.targets in the recipe",
        )
