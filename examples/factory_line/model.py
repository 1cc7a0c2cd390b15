"""The example's model: a timm Vision Transformer behind a convolutional stem.

A plain patch embedding learns nothing for many epochs on a small data set; with three strided
convolutions before the first block the same transformer learns from the first epoch.
"""

from typing import Any

import timm
import torch
from torch import nn


class ConvStem(nn.Module):
    """Patch embedding by three 3x3 convolutions and a 1x1 projection; takes timm's arguments.

    Image (B, in_chans, img_size, img_size) -> tokens (B, (img_size / 12) ** 2, embed_dim).
    """

    def __init__(
        self,
        img_size: int = 96,
        patch_size: int = 12,
        in_chans: int = 3,
        embed_dim: int = 256,
        **_ignored: Any,  # timm also passes bias and dynamic_img_pad; neither has a meaning here
    ) -> None:
        super().__init__()
        if patch_size != 12 or img_size % patch_size:
            raise ValueError(
                f"the stem's strides make patches of 12 pixels, not {patch_size} over {img_size}: "
                "use patch_size=12 and an img_size that is a multiple of 12"
            )
        side = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        self.convolutions = nn.Sequential(
            _convolution(in_chans, 32, stride=2),
            _convolution(32, 64, stride=2),
            _convolution(64, 128, stride=3),
        )
        self.proj = nn.Conv2d(128, embed_dim, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(self.convolutions(image))
        return tokens.flatten(2).transpose(1, 2)


def _convolution(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.GELU(),
    )


def create_model(
    num_classes: int,
    *,
    img_size: int = 96,
    embed_dim: int = 256,
    depth: int = 4,
    num_heads: int = 4,
) -> nn.Module:
    """Build the untrained model; images (B, 3, img_size, img_size) -> logits (B, num_classes)."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=img_size,
        patch_size=12,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        embed_layer=ConvStem,
    )
    return model
