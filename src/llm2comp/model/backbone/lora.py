"""LoRA over a linear layer as one operation: y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ, in x's dtype.

peft's own layer casts every input to the adapter's float32 and adds the two products in an
operation of its own. Over a bfloat16 LM that is a float32 copy of x for each projection. Here
1. A and B stay float32, as the optimiser's master weights; their copies in the dtype of x are small
2. active adapters become one: rows of A below each other, columns of scale·B beside each other
3. the second product is added into the first one's output, and so are the two parts of the gradient
   of x
4. kept for the backward pass are x, which projections of one input share, and x·Aᵀ, which is narrow
5. dropout keeps a byte for each number of x, whether it was dropped; torch's own keeps the dropped
   x and its mask, eight bytes, for each projection. On a CPU it draws what torch's draws
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn


class LoraLinear(lora.Linear):
    """peft's LoRA layer with another forward pass.

    `adopt` makes one of a layer that peft has built.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """States (..., in) → (..., out).

        What the one operation cannot do goes through peft's own pass.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            found: Tensor = self.base_layer(x, *args, **kwargs)
            return found
        dropped = any(
            self.lora_dropout[name].training and getattr(self.lora_dropout[name], "p", 0.0)
            for name in active
        )
        unusual = self.merged or args or kwargs or torch.is_autocast_enabled(x.device.type)
        if unusual or hasattr(self.base_layer.weight, "ds_id") or (dropped and len(active) > 1):
            return super().forward(x, *args, **kwargs)
        down, up, scaling = cast(Any, self.lora_A), cast(Any, self.lora_B), self.scaling
        a_RI = torch.cat([down[name].weight.to(x.dtype) for name in active])
        b_OR = torch.cat([(scaling[name] * up[name].weight).to(x.dtype) for name in active], 1)
        x_NI = x.flatten(0, -2)
        kept_NI = None
        if dropped:
            rate = cast(Any, self.lora_dropout[active[0]]).p
            kept_NI = torch.empty_like(x_NI).bernoulli_(1.0 - rate).bool()
            a_RI = a_RI / (1.0 - rate) if rate < 1.0 else a_RI
        found = _Lora.apply(x_NI, kept_NI, self.base_layer.weight, self.base_layer.bias, a_RI, b_OR)  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], -1)


def adopt(layer: nn.Module) -> None:
    """Turn peft's layer over a stock `nn.Linear` into a `LoraLinear`; leave any other alone."""
    if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LoraLinear


class _Lora(torch.autograd.Function):
    """The module's docstring, steps 3 to 5.

    `kept_NI`: which numbers of x reach A; None where all do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        kept_NI: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
    ) -> Tensor:
        narrow_NR = (x_NI if kept_NI is None else x_NI * kept_NI) @ a_RI.T
        found_NO = nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(narrow_NR, b_OR.T)
        ctx.save_for_backward(x_NI, kept_NI, narrow_NR, weight_OI, a_RI, b_OR)
        return found_NO

    @staticmethod
    def backward(
        ctx: Any, *incoming: Any
    ) -> tuple[Tensor | None, None, None, None, Tensor | None, Tensor | None]:
        x_NI, kept_NI, narrow_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        gradient_NO: Tensor = incoming[0]
        of_x, _, _, _, of_a, of_b = ctx.needs_input_grad
        narrow_gradient_NR = gradient_NO @ b_OR
        through_NI: Any = None
        if of_x:
            through_NI = gradient_NO @ weight_OI
            if kept_NI is None:
                through_NI.addmm_(narrow_gradient_NR, a_RI)
            else:
                through_NI.addcmul_(narrow_gradient_NR @ a_RI, kept_NI.to(a_RI.dtype))
        into_a_NI = x_NI if kept_NI is None or not of_a else x_NI * kept_NI
        return (
            through_NI,
            None,
            None,
            None,
            narrow_gradient_NR.T @ into_a_NI if of_a else None,
            gradient_NO.T @ narrow_NR if of_b else None,
        )
