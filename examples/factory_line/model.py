"""The example's models: timm's Vision Transformer and Swin behind a convolutional stem.

A plain patch embedding learns nothing for many epochs on a small data set; with three strided
convolutions before the first block the same transformer learns from the first epoch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

_STRIDES = {8: (2, 2, 2), 12: (2, 2, 3)}  # of the stem's convolutions, by patch size


class ConvStem(nn.Module):
    """Patch embedding by three 3x3 convolutions and a 1x1 projection; takes timm's arguments.

    Image (B, in_chans, img_size, img_size) -> tokens (B, (img_size / patch_size) ** 2, embed_dim),
    or (B, img_size / patch_size, img_size / patch_size, embed_dim) with output_fmt "NHWC".
    """

    def __init__(
        self,
        img_size: int = 96,
        patch_size: int = 12,
        in_chans: int = 3,
        embed_dim: int = 256,
        output_fmt: str = "NLC",
        **_ignored: Any,  # timm also passes bias, norm_layer and more; none has a meaning here
    ) -> None:
        super().__init__()
        if patch_size not in _STRIDES or img_size % patch_size:
            raise ValueError(
                f"the stem's strides make patches of 8 or 12 pixels, not {patch_size} over "
                f"{img_size}: use patch_size=12 (or 8) and an img_size that is a multiple of it"
            )
        side = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        self.output_fmt = output_fmt
        first, second, third = _STRIDES[patch_size]
        self.convolutions = nn.Sequential(
            _convolution(in_chans, 32, stride=first),
            _convolution(32, 64, stride=second),
            _convolution(64, 128, stride=third),
        )
        self.proj = nn.Conv2d(128, embed_dim, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(self.convolutions(image))
        if self.output_fmt == "NHWC":
            return tokens.permute(0, 2, 3, 1)
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


def create_swin(
    num_classes: int,
    *,
    img_size: int = 96,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2),
    num_heads: Sequence[int] = (4, 8),
    window_size: int = 6,
) -> nn.Module:
    """Build the untrained Swin; images (B, 3, img_size, img_size) -> logits (B, num_classes).

    Attention in shifted windows over (img_size / 8) ** 2 tokens, each later stage over a quarter
    of them at twice the width.
    """
    model: nn.Module = SwinTransformer(
        num_classes=num_classes,
        img_size=img_size,
        patch_size=8,
        embed_dim=embed_dim,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        window_size=window_size,
        drop_path_rate=0.0,  # too shallow to gain by it
        embed_layer=ConvStem,
    )
    return model


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"vit": create_model, "swin": create_swin}
