"""Weights in and out: the Swin authors' files, and state dicts of timm, torchvision, transformers.

Which of them a state dict is, its keys tell. One table, `names.pieces`, says where each of our
tensors lies in each of them; it is read in both directions, so what came in goes out bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from swin_kernels.geometry import Grid
from swin_kernels.models.attention import MapAttention, MapAttentionV2
from swin_kernels.models.names import Layout, found_layout, layout_for, pieces
from swin_kernels.models.simmim import SimMIM
from swin_kernels.models.swin import SwinTransformer
from swin_kernels.models.swin_v2 import SwinTransformerV2
from swin_kernels.models.vit import VisionTransformer, resize_positions
from swin_kernels.position_bias import relative_position_index, resize_table

Model = SwinTransformer | VisionTransformer | SimMIM
# made from sizes alone, so not loaded; some libraries save them
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_SHOWN = 6  # keys of a kind in a message


@dataclass(frozen=True)
class Loaded:
    """What `load` did."""

    layout: str  #: the library whose names the checkpoint has
    resized: tuple[str, ...]  #: our tensors that were interpolated to another window or image
    missing: tuple[str, ...]  #: ours that were not taken and stay as they were
    unexpected: tuple[str, ...]  #: keys of the checkpoint that this model has no place for


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save's or of safetensors; nothing in it is executed.

    Of the authors' files, what is under "model"; of others also "state_dict".

    Args:
        path: a file; the suffix .safetensors selects that format, which needs the package.

    Raises:
        ValueError: a file that holds no state dict, or is damaged.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # of a damaged file: whatever its reader runs into
        raise ValueError(
            f"{path}: expected a file of torch.save's or of safetensors with tensors alone (what "
            f"holds more, load yourself and pass its state dict): {type(error).__name__}: {error}"
        ) from error
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    return _checked(content, str(path))


def _checked(state: object, of: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{of}: expected a state dict, names with tensors, got {_kind(state)}")
    return dict(state)


def _kind(content: object) -> str:
    if isinstance(content, Mapping):
        other = next(k for k, v in content.items() if not isinstance(v, Tensor))
        return f"a {type(content[other]).__name__} under {other!r}"
    return f"a {type(content).__name__}"


def _encoder(model: Model) -> SwinTransformer | VisionTransformer:
    return model.encoder if isinstance(model, SimMIM) else model


def _family(model: Model) -> str:
    encoder = _encoder(model)
    if isinstance(encoder, VisionTransformer):
        return "vit"
    return "swinv2" if isinstance(encoder, SwinTransformerV2) else "swin"


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


@dataclass
class _Reading:
    """A checkpoint while it is taken apart for one model; the model changes only at the end."""

    model: Model
    state: dict[str, Tensor]
    layout: Layout
    used: set[str] = field(default_factory=set)
    resized: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor | None:
        """Ours by this name, None where any part of it is missing."""
        places = pieces(name, self.layout)
        if not all(piece.name in self.state for piece in places):
            return None
        self.used.update(piece.name for piece in places)
        wholes = [self.state[piece.name] for piece in places]
        thirds = [piece.third for piece in places]
        if any(t is not None and (w.ndim != 1 or len(w) % 3) for w, t in zip(wholes, thirds)):
            self.wrong.append(f"{name}: expected three parts of {_shapes(wholes)}")
        elif len({w.shape[1:] if w.ndim else None for w in wholes}) > 1:
            self.wrong.append(f"{name}: expected parts of one width, got {_shapes(wholes)}")
        else:
            parts = [w if t is None else w.chunk(3)[t] for w, t in zip(wholes, thirds)]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return None

    def fitted(self, name: str, tensor: Tensor, own: Tensor) -> Tensor:
        """`tensor` in the shape of `own`: resized if it is a table of another window."""
        if tensor.shape == own.shape:
            return tensor
        try:
            moved = self._resized(name, tensor)
        except ValueError as error:
            self.wrong.append(f"{name}: {error}")
            return own
        if moved is None or moved.shape != own.shape:
            self.wrong.append(f"{name}: expected {tuple(own.shape)}, got {tuple(tensor.shape)}")
            return own
        self.resized.append(name)
        return moved

    def _resized(self, name: str, tensor: Tensor) -> Tensor | None:
        encoder = _encoder(self.model)
        if name.endswith("relative_position_bias_table") and tensor.ndim == 2:
            side = (math.isqrt(tensor.shape[0]) + 1) // 2
            attention = self.model.get_submodule(name.rpartition(".")[0])
            assert isinstance(attention, MapAttention)
            if (2 * side - 1) ** 2 != len(tensor) or len(set(attention.window_size)) > 1:
                return None  # a window that is not square is not to be guessed
            return resize_table(tensor, (side, side), attention.window_size)
        if name.endswith("pos_embed") and isinstance(encoder, VisionTransformer):
            config = encoder.config
            return resize_positions(tensor, config.tokens, (config.grid, config.grid))
        return None

    def check_coordinates(self) -> None:
        """The continuous bias of V2 must be asked where it was trained, if the file holds it."""
        for name, module in self.model.named_modules():
            if not isinstance(module, MapAttentionV2):
                continue
            (piece,) = pieces(f"{name}.relative_coords_table", self.layout)
            theirs = self.state.get(piece.name)
            if theirs is None:
                continue
            trained, asked = map(_window_of, (theirs, module.coordinates()))
            if trained != asked:
                self.wrong.append(
                    f"{name}: its position bias was trained on windows of {trained}: give "
                    "pretrained_window_sizes, one for each stage, to the model"
                )


def _window_of(coordinates: Tensor) -> int:
    """The window that log-spaced coordinates were divided by: found from their smallest step."""
    above = coordinates[coordinates > 0]
    return round(8 / (8 ** float(above.min()) - 1)) + 1 if len(above) else 1


def load(
    model: Model,
    source: str | Path | Mapping[str, Tensor],
    *,
    head: bool = True,
    strict: bool = True,
) -> Loaded:
    """Weights into `model`, from a file or a state dict of the authors, timm, torchvision or
    transformers.

    A position bias table of another window, and ViT's position embedding of another image, are
    resized by bicubic interpolation. Into an encoder, that of a SimMIM checkpoint is taken; into a
    model with `features_only`, the norm and the head of a classifier are left out.

    Args:
        model: a SwinTransformer (V1 or V2), a VisionTransformer or a SimMIM; changed in place.
        source: a file that `read` takes, or a state dict.
        head: False leaves the model's own head as it is (another number of classes).
        strict: False takes what fits by name, and names the rest in what it returns.

    Returns:
        The layout found, and the tensors that were resized, missing or unexpected.

    Raises:
        ValueError: keys of no library that is known; keys missing or unexpected; shapes that do
            not fit. The model is unchanged then.
    """
    state = read(source) if isinstance(source, (str, Path)) else _checked(source, "source")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "model: expected parameters with memory, got some on the meta device: "
            "model.to_empty(device=…) first"
        )
    reading = _Reading(model, state, found_layout(state))
    taken: dict[str, Tensor] = {}
    missing = []
    for name, tensor in model.state_dict().items():
        if (not head and name.startswith("head")) or (found := reading.tensor(name)) is None:
            missing.append(name)
        else:
            taken[name] = reading.fitted(name, found, tensor)
    reading.check_coordinates()
    left = [name for name in state if name not in reading.used and not name.endswith(_BUFFERS)]
    allowed = _may_lack(model, head), _may_hold(model, reading.layout, head)
    _raise_for(
        reading,
        [name for name in missing if not name.startswith(allowed[0])] if strict else [],
        [name for name in left if not name.startswith(allowed[1])] if strict else [],
    )
    model.load_state_dict(taken, strict=False)
    for module in model.modules():  # to_empty leaves what is not in a state dict undefined
        if isinstance(module, MapAttentionV2):
            module.relative_coords_table.copy_(module.coordinates())
    return Loaded(reading.layout.name, tuple(reading.resized), tuple(missing), tuple(left))


def _may_lack(model: Model, head: bool) -> tuple[str, ...]:
    """Beginnings of our names that need not be in a checkpoint."""
    names = [] if head else ["head"]
    if getattr(model, "features_only", False):
        names.append("out_norms.")
    names += [n for n, _ in model.named_modules() if n.endswith(".before_attention")]
    return tuple(names)


def _may_hold(model: Model, layout: Layout, head: bool) -> tuple[str, ...]:
    """Their names for which a backbone, or an encoder, has no place."""
    layers = [] if isinstance(model, SimMIM) else ["decoder.0"]
    if not head or not hasattr(model, "head") or isinstance(model.head, nn.Identity):
        layers += ["head", "head_dist"]
    if getattr(model, "features_only", False):
        layers.append("norm")
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")] + ["mask_token"]
    return tuple(piece.name for name in names for piece in pieces(name, layout))


def _raise_for(reading: _Reading, missing: list[str], unexpected: list[str]) -> None:
    complaints = list(reading.wrong[:_SHOWN])
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            complaints.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    if any(name.startswith("head") for name in missing) or any("head." in w for w in reading.wrong):
        complaints.append("head=False keeps the model's own head")
    if complaints:
        raise ValueError(
            f"the checkpoint, by its keys one of {reading.layout.name}, does not fit "
            f"{type(reading.model).__name__}: " + "; ".join(complaints)
        )


def state_dict_for(model: Model, layout: str) -> dict[str, Tensor]:
    """The weights of `model` under the names of `layout`, with the buffers that it saves.

    Args:
        model: a SwinTransformer (V1 or V2), a VisionTransformer or a SimMIM.
        layout: "authors", "timm", "timm-features" (of its `features_only` models, which have no
            norm and no head), "torchvision", "transformers" or "transformers-old".

    Returns:
        A new state dict; the tensors are copies.

    Raises:
        ValueError: a layout that is not known, or not for models of this kind.
    """
    target = layout_for(layout, _family(model), isinstance(model, SimMIM))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(target.lacks):
            continue
        parts = pieces(name, target)
        cut = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
        for piece, part in zip(parts, cut):
            if piece.third is None:
                state[piece.name] = part.clone()
            else:  # keys of V2 have no bias; where there is room for one, it is 0
                whole = state.setdefault(piece.name, part.new_zeros(3 * part.shape[0]))
                whole.chunk(3)[piece.third].copy_(part)
    state.update(_buffers(model, target))
    return state


def _buffers(model: Model, layout: Layout) -> dict[str, Tensor]:
    """What a library keeps in its files though it follows from the sizes."""
    state = {}
    for name, module in model.named_modules():
        if not isinstance(module, (MapAttention, MapAttentionV2)):
            continue
        window = module.window_size
        found = {"attn.relative_position_index": relative_position_index(window)}
        if isinstance(module, MapAttentionV2):
            sides = [2 * w - 1 for w in window]
            found["attn.relative_coords_table"] = module.coordinates().view(1, *sides, 2)
        if any(module.shift_size):
            encoder = _encoder(model)
            assert isinstance(encoder, SwinTransformer)
            stage = int(name.removeprefix("encoder.").split(".")[1])
            side = encoder.config.map_size(stage)
            if side > window[0]:
                grid = Grid.checked((side, side), window, module.shift_size)
                found["attn_mask"] = grid.shift_mask(dtype=torch.float32)
        block = name.removesuffix("attn")
        for buffer, tensor in found.items():
            if buffer in layout.buffers:
                (piece,) = pieces(block + buffer, layout)
                flat = layout.buffers[buffer] == "flat"
                state[piece.name] = tensor.flatten() if flat else tensor
    return state
