"""The stack of LoRA adapters over a frozen LM.

Each stage adds one adapter; older ones stay active but frozen and without dropout. LoRA deltas add,
so the stack equals the release's merge-and-renew while the base itself is never modified.

While a stage trains, the older adapters need no operations of their own: `folded` puts them into a
second copy of the weights that they change. The encoder pass reads that copy, teacher and decoder
go on reading the bare weights.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llm2comp.errors import BackboneError
from llm2comp.model.backbone.families import lora_targets, split_targets
from llm2comp.model.backbone.lora import LoraLinear, adopt
from llm2comp.model.backbone.quantized import plain_copy, quantized_layers
from llm2comp.model.backbone.sharded import writes
from llm2comp.model.backbone.trainable import Trainable
from llm2comp.recipe import AdapterSettings


@dataclass(frozen=True)
class Fold:
    """A linear layer with two weights: the LM's own, and that with older adapters in it."""

    linear: nn.Linear
    bare: nn.Parameter
    with_older: nn.Parameter

    @classmethod
    def of(cls, layer: Any, names: Sequence[str]) -> Fold:
        """Of a LoRA layer and those of its adapters to be folded."""
        bare = layer.base_layer.weight
        added = torch.stack([layer.get_delta_weight(name).float() for name in names]).sum(0)
        return cls(
            layer.base_layer,
            bare,
            nn.Parameter((bare.float() + added).to(bare.dtype), requires_grad=False),
        )


class AdapterStack(Trainable):
    """Named LoRA adapters over one LM, oldest first.

    Experts' fused weights (mixtures of experts) are changed as W_e + scale·B_e·A_e for each expert
    e, without dropout, which cannot act on a weight's delta; all adapters of a stack change the
    same experts' weights (both are peft's rules).
    """

    file = "adapter_model.safetensors"

    def __init__(self, lm: Any, model_name: str) -> None:
        super().__init__(lm, model_name)
        self._peft: Any = None
        self._layers: list[Any] = []
        self._folds: list[Fold] = []

    def add(
        self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0
    ) -> None:
        """Put one more adapter on top; of all weights of the LM it alone learns from here on.

        Raises:
            BackboneError: the targets match no module of this model.
        """
        rate = settings.dropout if dropout is None else dropout
        config = self._config(settings, rate)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft speaks up for GPT-2's Conv1D and for a second adapter
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = peft.get_peft_model(self.lm, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise self._no_target(settings.targets, str(error)) from error
        self.names.append(name)
        self._layers = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        # peft knows one rate for all layers and no dropout on experts' weights
        if config.target_parameters:
            for layer in self._layers:
                if not isinstance(layer, ParamWrapper):
                    layer.lora_dropout[name] = nn.Dropout(rate)
        for layer in self._layers:
            adopt(layer)
        self._activate(self.names)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """LoRA weights of one adapter."""
        return [p for n, p in self.lm.named_parameters() if "lora_" in n and f".{name}." in n]

    @contextlib.contextmanager
    def switched(self, off: bool) -> Iterator[None]:
        """All adapters off (or on) inside.

        Flips the flag that peft's `disable_adapter()` flips, without its walk over the model and
        without touching `requires_grad`; a test holds the two against each other.
        """
        before = [layer._disable_adapters for layer in self._layers]
        with super().switched(off):
            for layer in self._layers:
                layer._disable_adapters = off
            self._show(bare=off)
            try:
                yield
            finally:
                for layer, value in zip(self._layers, before, strict=True):
                    layer._disable_adapters = value
        self._show(bare=self.off)

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, all adapters but the newest are part of the weights that the encoder pass reads:
        W + Σ scale·B·A.

        The sum is formed in float32 and rounded once to the dtype of W, as in `merged`. It costs
        one more copy of the weights that adapters change. Nothing happens without older adapters,
        or where a layer is not a plain linear one (quantised weights, experts, GPT-2's Conv1D):
        there they stay as they are.
        """
        older = self.names[:-1]
        if not older or not all(isinstance(layer, LoraLinear) for layer in self._layers):
            yield
            return
        with torch.no_grad():
            self._folds = [
                Fold.of(layer, names) for layer in self._layers if (names := _of(layer, older))
            ]
        self._activate(self.names[-1:])
        self._show(bare=self.off)
        try:
            yield
        finally:
            self._show(bare=True)
            self._folds = []
            self._activate(self.names)

    def _show(self, bare: bool) -> None:
        """Let the folded layers have their bare weights, or those with the older adapters.

        Another tensor takes the place, the old one keeps its values: a graph that was made with it
        is still right.
        """
        for fold in self._folds:
            fold.linear._parameters["weight"] = fold.bare if bare else fold.with_older

    def _activate(self, names: Sequence[str]) -> None:
        """Let these adapters act; of all weights of the LM the newest one's alone learn."""
        self._peft.base_model.set_adapter(list(names))
        self.lm.requires_grad_(False)
        for parameter in self.parameters(self.names[-1]):
            parameter.requires_grad_(True)

    @property
    def faster_merged(self) -> bool:
        """With adapters over plain weights: one product in place of three."""
        return bool(self.names) and not quantized_layers(self.lm)

    def dropouts(self, name: str) -> Sequence[nn.Module]:
        """One for each layer that an adapter changes."""
        return [m.lora_dropout[name] for m in self._layers if name in m.lora_dropout]

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter in peft's format (adapter_config.json, adapter_model.safetensors)."""
        super().save(name, folder)
        config = copy.copy(self._peft.peft_config[name])
        # as AutoPeftModelForCausalLM asks for
        config.inference_mode, config.task_type = (True, peft.TaskType.CAUSAL_LM)
        # the order of a set is another one in every process
        vars(config).update({k: sorted(v) for k, v in vars(config).items() if isinstance(v, set)})
        if writes():
            config.save_pretrained(str(folder))

    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM with all adapters in its weights: W + Σ scale·B·A in float32, then in
        the base's dtype.

        With a `dtype`, in that one, and on the CPU: beside the LM there may be no room for a wider
        copy.
        """
        self._show(bare=True)
        lm, quantized = plain_copy(self.lm)
        lm = lm if dtype is None else lm.cpu()
        self._show(bare=self.off)
        for path, module in list(lm.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                base = layer.get_base_layer()
                weight = getattr(base, getattr(layer, "parameter_name", "weight"))
                own, weight.data = weight.dtype, weight.data.float()
                for name in _of(layer, self.names):
                    weight.data += layer.get_delta_weight(name).float()
                weight.data = weight.data.to(dtype or own)
                # the inner of two wrappers around one module of experts
                if not path.endswith(".base_layer"):
                    lm.set_submodule(path, base)
        for linear in quantized:
            linear.to(dtype or lm.get_input_embeddings().weight.dtype)
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            lm.__dict__.pop(leftover, None)
        return lm if dtype is None else lm.to(dtype)

    def state(self, name: str) -> dict[str, Tensor]:
        """The live weights, by peft's names for them."""
        state: dict[str, Tensor] = peft.get_peft_model_state_dict(
            self._peft, adapter_name=name, save_embedding_layers=False
        )
        return state

    def _config(self, settings: AdapterSettings, dropout: float) -> Any:
        modules: Any = settings.targets
        experts: list[str] = []
        if modules != "all-linear":
            named = modules if modules != "default" else lora_targets(self.lm.config.model_type)
            modules, experts, unknown = split_targets(self.lm, named)
            if not (modules or experts) or (unknown and settings.targets != "default"):
                raise self._no_target(unknown or named)
        return peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0 if experts else dropout,
            target_modules=modules,
            target_parameters=experts or None,
            base_model_name_or_path=self.model_name,
        )

    def _no_target(self, targets: Any, reason: str | None = None) -> BackboneError:
        linear = [
            (n, 1)
            for n, m in self.lm.named_modules()
            if isinstance(m, nn.Linear) and ".lora_" not in n
        ]
        experts = [(n, 2) for n, weight in self.lm.named_parameters() if weight.ndim == 3]
        known = {
            ".".join(n.replace(".base_layer", "").split(".")[-parts:])
            for n, parts in linear + experts
        }
        return BackboneError(
            f"cannot carry these LoRA targets: {reason}"
            if reason
            else "LoRA targets match no module",
            where=f"{self.model_name} (model_type {self.lm.config.model_type})",
            expected=f"some of {', '.join(sorted(known))}",
            found=targets if isinstance(targets, str) else ", ".join(sorted(targets)) or "none",
            fix="set adapter.targets in the recipe",
        )


def _of(layer: Any, names: Sequence[str]) -> list[str]:
    """Those adapters that change this layer: each has its own targets."""
    return [name for name in names if name in layer.lora_A]
