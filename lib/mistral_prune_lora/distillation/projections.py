"""LoRA's projections with their gradients written out: fewer tensors are kept for the backward pass, fewer are made.

PEFT's layers compute y = W x + s B A x by ordinary operations. Autograd then keeps what enters A in the adapter's
dtype, a copy for each projection where the weights are bf16, and of the gated MLP it keeps the gate, its SiLU, the
other half and their product. Here a projection keeps what enters it, as it came, and the MLP's last one the two halves;
SiLU and product are computed again. Sums are added in place instead of beside each other. With g the gradient by y:

    by x   W^T g + s A^T B^T g          by A   s (B^T g) x^T          by B   s g (A x)^T
    by gate   silu'(gate) up p          by up   silu(gate) p          for p, the gradient by silu(gate) up

The weights stay in PEFT's modules, which save and load them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation


def write_out_gradients(model: PreTrainedModel) -> int:
    """Let a model's adapted projections compute their gradients themselves; returns how many do.

    Those whose adapter is more than the formula above stay as PEFT has them (DoRA, a frozen weight in 4 bits).

    Args:
        model: with one adapter of PEFT's in its decoder layers; it is changed in place.
    """
    found = {name: module for name, module in model.named_modules() if _is_plain(module)}
    for name, module in found.items():
        gated = model.get_submodule(name.rpartition(".")[0])
        if getattr(gated, "down_proj", None) is module and isinstance(gated.act_fn, (nn.SiLU, SiLUActivation)):
            gated.forward = partial(_gated_mlp, gated)
        else:
            module.forward = partial(_projection, module)
    return len(found)


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.fan_in_fan_out
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


def _projection(module: Linear, x: torch.Tensor) -> torch.Tensor:
    if _is_off(module):
        return Linear.forward(module, x)
    return _Projection.apply(x, *_operands(module))


def _gated_mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if _is_off(mlp.down_proj):
        return type(mlp).forward(mlp, x)
    return _GatedProjection.apply(mlp.gate_proj(x), mlp.up_proj(x), *_operands(mlp.down_proj))


def _is_off(module: nn.Module) -> bool:
    """Whether PEFT's own code is to run: the adapter is switched off, is in the weight already, or was taken out."""
    return not isinstance(module, Linear) or module.disable_adapters or module.merged


def _operands(module: Linear) -> tuple[Any, ...]:
    """The tensors and numbers of an adapted projection, in the order of `_Lora`; dropout is 0 but in training."""
    (name,) = module.lora_A
    dropout = module.lora_dropout[name]
    share = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
    base: Any = module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return base.weight, base.bias, a, b, module.scaling[name], share


@dataclass(frozen=True)
class _Lora:
    """One adapted projection: y = W x + bias + scaling B A dropout(x), tokens as rows.

    Attributes:
        weight, bias: frozen, in the compute dtype; shapes (out, in) and (out,), or None.
        a, b: shapes (r, in) and (out, r).
        dropout: the share of what enters A that is dropped.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float

    def mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """What dropout keeps of x, drawn anew; None if that is all."""
        if not self.dropout:
            return None
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """y, shape (tokens, out), in the dtype of x, and A dropout(x), shape (tokens, r), in the adapter's."""
        y, low = functional.linear(x, self.weight, self.bias), self._entering(x, mask) @ self.a.T
        if y.dtype == low.dtype:
            return y.addmm_(low, self.b.T, alpha=self.scaling), low
        return torch.addmm(y.to(low.dtype), low, self.b.T, alpha=self.scaling).to(y.dtype), low

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, low: torch.Tensor, *, below: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The gradients by x (None unless something `below` needs it), A and B, from that by y."""
        wide = gradient.to(low.dtype)
        by_low = (wide @ self.b).mul_(self.scaling)
        by_a, by_b = by_low.T @ self._entering(x, mask), (wide.T @ low).mul_(self.scaling)
        if not below:
            return None, by_a, by_b
        by_x = gradient @ self.weight
        if mask is None and by_x.dtype == by_low.dtype:
            return by_x.addmm_(by_low, self.a), by_a, by_b
        return by_x.add_(self._kept(by_low @ self.a, mask).to(by_x.dtype)), by_a, by_b

    def _entering(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self._kept(x.to(self.a.dtype), mask)

    def _kept(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return x if mask is None else (x * mask).div_(1 - self.dropout)


class _Projection(torch.autograd.Function):
    """y of `_Lora`, for x of shape (..., in)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dropout):
        lora, rows = _Lora(weight, bias, a, b, scaling, dropout), x.flatten(0, -2)
        mask = lora.mask(rows)
        y, low = lora.forward(rows, mask)
        ctx.save_for_backward(x, weight, a, b, mask, low)
        ctx.numbers = (scaling, dropout)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, a, b, mask, low = ctx.saved_tensors
        lora, below = _Lora(weight, None, a, b, *ctx.numbers), ctx.needs_input_grad[0]
        by_x, by_a, by_b = lora.backward(gradient.flatten(0, -2), x.flatten(0, -2), mask, low, below=below)
        return by_x if by_x is None else by_x.view_as(x), None, None, by_a, by_b, None, None


class _GatedProjection(torch.autograd.Function):
    """y of `_Lora` for x = silu(gate) up, of shape (..., in)."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias, a, b, scaling, dropout):
        lora, rows = _Lora(weight, bias, a, b, scaling, dropout), functional.silu(gate).mul_(up).flatten(0, -2)
        mask = lora.mask(rows)
        y, low = lora.forward(rows, mask)
        ctx.save_for_backward(gate, up, weight, a, b, mask, low)
        ctx.numbers = (scaling, dropout)
        return y.unflatten(0, gate.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up, weight, a, b, mask, low = ctx.saved_tensors
        lora, below = _Lora(weight, None, a, b, *ctx.numbers), any(ctx.needs_input_grad[:2])
        active = functional.silu(gate)
        product = (active * up).flatten(0, -2)
        by_product, by_a, by_b = lora.backward(gradient.flatten(0, -2), product, mask, low, below=below)
        by_gate = by_up = None
        if by_product is not None:
            del product
            by_product = by_product.view_as(gate)
            by_up = active.mul_(by_product)
            by_gate = torch.ops.aten.silu_backward(by_product.mul_(up), gate)
        return by_gate, by_up, None, None, by_a, by_b, None, None
