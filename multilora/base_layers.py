"""The layers of a loaded base, made alike: whatever a base has becomes a linear layer that treats every row by itself.

Dims: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's own abbreviation
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def make_layers_alike(model: PreTrainedModel) -> None:
    """Replace GPT-2's Conv1D and bitsandbytes' 8-bit layers in place, and keep the 4-bit ones from changing in use."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear_over(module))
        elif isinstance(module, nn.Linear) and module.weight.dtype == torch.int8:
            model.set_submodule(name, Int8Linear(module))
        elif isinstance(module, nn.Linear) and module.weight.dtype == torch.uint8:
            # On a CPU with avx512_bf16 the first forward without gradients would repack the weights into a form that rounds
            # to bfloat16 and lets no gradient through, so adapters below the layer would silently stop learning.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class Int8Linear(nn.Linear):
    """A linear layer over bitsandbytes' int8 weights that leaves its input as it is: y = (x W^T) scale_O + bias.

    LLM.int8 rounds the input as well and spares the features above 6 in any row of the batch, so a row's answer depends on
    its neighbours. On MiniLM (scores up to 20, 64 texts) neighbours move a score by 0.8 that way, and by 1e-5 here; the mean
    error against float32 is .064 for LLM.int8, .128 for it without the spared features, .042 here.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale_O", layer.weight.SCB / 127)
        self.scale_O: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; scale and bias are added in float32."""
        product: Tensor = _Int8Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        y = product * self.scale_O
        return (y if self.bias is None else y + self.bias).to(input.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T for int8 W. Autograd by itself would keep every layer's W in the dtype of x until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Multiply in the dtype of x, in which int8 is exact."""
        ctx.save_for_backward(weight_OI)
        return F.linear(x, weight_OI.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        """Give x its gradient."""
        (weight_OI,) = ctx.saved_tensors
        return grad_y @ weight_OI.to(grad_y.dtype), None


def _linear_over(conv: Conv1D) -> nn.Linear:
    """A linear layer over the same memory; Conv1D only stores its weight the other way round."""
    weight_OI = conv.weight.detach().T
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight_OI, requires_grad=False), conv.bias
    return linear
