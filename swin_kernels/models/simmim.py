"""SimMIM (Xie et al., CVPR 2022, arXiv 2111.09886): pixels of hidden patches from the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swin_kernels.models.swin import SwinTransformer
from swin_kernels.models.vit import VisionTransformer


def random_masks(
    batch: int,
    grid: tuple[int, int],
    ratio: float = 0.6,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(batch, *grid) bool: ⌈ratio·n⌉ of the n patches of each image, True where hidden (3.2).

    Args:
        batch: images.
        grid: patches on either axis, (height, width).
        ratio: how much of an image is hidden, 0 to 1.
        generator: None takes torch's default generator of `device`.
        device: of the result; None is torch's default device.

    Raises:
        ValueError: a ratio below 0 or above 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected between 0 and 1, got {ratio}")
    patches = math.prod(grid)
    order = torch.rand(batch, patches, generator=generator, device=device).argsort(1)
    return (order.argsort(1) < math.ceil(ratio * patches)).view(batch, *grid)


def _enlarged(mask: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Each cell of (B, h, w) `factor` times on either axis, cut to `size`."""
    mask = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return mask[:, : size[0], : size[1]]


class SimMIM(nn.Module):
    """Mean L1 error over hidden pixels of what `encoder` and a linear head make of an image.

    Hidden are squares of `mask_patch_size` pixels that lie on the grid of the encoder's patches;
    their embeddings become `mask_token` before anything is added (section 3.1 to 3.4).

    Args:
        encoder: a SwinTransformer (V1 or V2) or a VisionTransformer. A head would get no gradient:
            make it with num_classes=0.
        mask_patch_size: pixels on a side of what is hidden at once, a multiple of the patch size.
        mask_ratio: how much of an image is hidden.

    Raises:
        ValueError: an encoder or sizes that do not fit, here or in forward.
    """

    def __init__(
        self,
        encoder: SwinTransformer | VisionTransformer,
        mask_patch_size: int = 32,
        mask_ratio: float = 0.6,
    ) -> None:
        super().__init__()
        if getattr(encoder, "features_only", False):
            raise ValueError("encoder: expected one that ends in a norm, got features_only=True")
        config = encoder.config
        if mask_patch_size < 1 or mask_patch_size % config.patch_size != 0:
            raise ValueError(
                f"mask_patch_size: expected a multiple of the patches of {config.patch_size}, "
                f"got {mask_patch_size}"
            )
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio: expected above 0 and at most 1, got {mask_ratio}")
        self.encoder = encoder
        self.mask_patch_size = mask_patch_size
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, encoder.stride**2 * config.in_chans, 1),
            nn.PixelShuffle(encoder.stride),
        )

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Squares that can be hidden, on either axis of images (B, C, height, width)."""
        if image.ndim != 4:
            raise ValueError(f"image: expected (B, C, height, width), got {tuple(image.shape)}")
        height, width = (-(-size // self.mask_patch_size) for size in image.shape[2:])
        return height, width

    def masks(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random masks for a batch of images, (B, *grid)."""
        device = image.device if generator is None else generator.device
        grid = self.grid(image)
        masks = random_masks(image.shape[0], grid, self.mask_ratio, generator, device)
        return masks.to(image.device)

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, C, height, width), and a mask (B, *grid), True where hidden -> all pixels."""
        expected = (image.shape[0], *self.grid(image))
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected {expected} of bool, a cell for {self.mask_patch_size}² pixels, "
                f"got {tuple(mask.shape)} of {mask.dtype}"
            )

        def hide(patches: Tensor) -> Tensor:
            cells = self.mask_patch_size // self.encoder.config.patch_size
            hidden = _enlarged(mask, cells, (patches.shape[1], patches.shape[2]))
            return torch.where(hidden[..., None], self.mask_token.to(patches.dtype), patches)

        features = self.encoder.forward_map(image, hide).permute(0, 3, 1, 2)
        return self.decoder(features)[..., : image.shape[2], : image.shape[3]]

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, height, width), and a mask (B, *grid) or None for a random one -> the loss."""
        if mask is None:
            mask = self.masks(image)
        pixels = self.reconstruct(image, mask)
        hidden = _enlarged(mask, self.mask_patch_size, (image.shape[2], image.shape[3]))[:, None]
        error = (pixels - image).abs() * hidden
        # a batch of which nothing is hidden has no error
        wide = torch.promote_types(error.dtype, torch.float32)  # fp16 would overflow
        return error.sum(dtype=wide) / (hidden.sum().clamp(min=1) * image.shape[1])
