"""Networks that look trained, without training."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from HSI_SSFTT import SSFTT


def batch_norms(model: SSFTT) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def like_trained(model: SSFTT, seed: int = 0) -> SSFTT:
    """Random batch norms and class token, logits further apart; in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    for norm in batch_norms(model):
        for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
            tensor.copy_(torch.randn(tensor.shape, generator=g))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=g) + 0.3)
    model.class_token.data.copy_(torch.randn(model.class_token.shape, generator=g))
    model.head.weight.data.mul_(5)
    return model.eval()
