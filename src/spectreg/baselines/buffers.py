"""A forward pass that leaves the model's buffers as they are."""

from torch import Tensor, nn
from torch.func import functional_call


def without_updates(model: nn.Module, x: Tensor) -> Tensor:
    """``model(x)`` on copies of the model's buffers: what the forward writes there is lost."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, buffers, (x,))
