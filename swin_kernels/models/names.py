"""What our tensors are called in the files of others: a table for each library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Piece(NamedTuple):
    """Where a tensor of ours, or a part of it along its first axis, lies in a checkpoint."""

    name: str
    third: int | None = None  # which third of that tensor; None: all of it


@dataclass(frozen=True)
class Layout:
    """Names of one library; `rules` are applied to our name in their order, all that match."""

    name: str
    patches: str  # its name of the patch embedding's weight, by which it is found
    rules: tuple[tuple[str, str], ...] = ()
    outside: tuple[str, ...] = ()  # beginnings of names that stand outside `prefix`
    qkv: tuple[str, ...] = ()  # three layers, where one of ours holds all
    packed_bias: bool = False  # V2's biases of queries and values lie in one of qkv
    # those that it saves; those that are "flat" have one axis
    buffers: Mapping[str, str] = field(default_factory=dict)
    wrapper: str = ""  # before every name: what DistributedDataParallel and others add
    prefix: str = ""  # before the encoder's own names
    lacks: tuple[str, ...] = ()  # beginnings of our names that its models do not have


_STAGE = r"^layers\.(\d+)\."
_AUTHORS = Layout(
    "authors",
    "patch_embed.proj.weight",
    ((r"^out_norms\.(\d)", r"norm\1"),),
    ("decoder.",),
    buffers=dict.fromkeys(
        ("attn.relative_position_index", "attn.relative_coords_table", "attn_mask"), "as they are"
    ),
)
_TIMM = replace(
    _AUTHORS,
    name="timm",
    rules=(
        # a stage begins with the merging that ours before it ends with
        (_STAGE + "downsample", "layers.{next}.downsample"),
        (r"^head\.", "head.fc."),
    ),
    buffers={},
)
_TIMM_FEATURES = replace(  # features_only=True: stages are attributes of their own
    _TIMM,
    name="timm-features",
    rules=(*_TIMM.rules, (r"^layers\.", "layers_")),
    lacks=("norm.", "head", "out_norms."),
)
_VIT = replace(_TIMM, rules=())
_TORCHVISION = Layout(
    "torchvision",
    "features.0.0.weight",
    (
        (r"^patch_embed\.proj", "features.0.0"),
        (r"^patch_embed\.norm", "features.0.2"),
        (_STAGE + r"blocks\.", "features.{blocks}."),
        (_STAGE + r"downsample", "features.{merging}"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
    ),
    packed_bias=True,
    buffers={
        "attn.relative_position_index": "flat",
        "attn.relative_coords_table": "as it is",
    },
)
_TRANSFORMERS = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^mask_token", "embeddings.mask_token"),
    (r"^layers\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
    (r"^out_norms\.(\d)", "hidden_states_norms.stage{next}"),
    (r"blocks\.(\d+)\.norm1", r"blocks.\1.layernorm_before"),
    (r"blocks\.(\d+)\.norm2", r"blocks.\1.layernorm_after"),
)
_NEW_TRANSFORMERS = Layout(
    "transformers",
    "embeddings.patch_embeddings.projection.weight",
    (
        *_TRANSFORMERS,
        (r"attn\.proj", "attention.o_proj"),
        (r"attn\.(relative_position_bias_table)", r"attention.relative_position_bias.\1"),
    ),
    ("classifier.", "decoder.", "hidden_states_norms."),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
_OLD_TRANSFORMERS = replace(
    _NEW_TRANSFORMERS,
    name="transformers-old",
    rules=(
        *_TRANSFORMERS,
        (r"attn\.proj", "attention.output.dense"),
        (r"attn\.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
        (r"attn\.", "attention.self."),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ),
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
)
LAYOUTS = {
    layout.name: layout
    for layout in (
        _AUTHORS,
        _TIMM,
        _TIMM_FEATURES,
        _TORCHVISION,
        _NEW_TRANSFORMERS,
        _OLD_TRANSFORMERS,
    )
}


def found_layout(state: Mapping[str, object]) -> Layout:
    """The layout that the keys of a checkpoint have; ValueError if it is none that is known."""
    for known in (_AUTHORS, _TORCHVISION, _NEW_TRANSFORMERS):
        key = next((k for k in state if f".{k}".endswith(f".{known.patches}")), None)
        if key is None:
            continue
        before = key.removesuffix(known.patches)
        wrapper = re.sub(r"(swin|swinv2|encoder)\.$", "", before)
        layout = replace(
            _variant(known, state, before), wrapper=wrapper, prefix=before.removeprefix(wrapper)
        )
        if f"{wrapper}mask_token" in state:  # our own SimMIM keeps it beside the encoder
            layout = replace(layout, outside=(*layout.outside, "mask_token"))
        return layout
    some = ", ".join(list(state)[:3]) or "none at all"
    raise ValueError(
        "expected a checkpoint of Swin, Swin V2 or ViT by its authors, timm, torchvision or "
        f"transformers, with a patch embedding such as {_AUTHORS.patches!r}; "
        f"got keys such as {some}"
    )


def _variant(known: Layout, state: Mapping[str, object], prefix: str) -> Layout:
    """Which of the layouts with the same patch embedding it is."""
    if known is _NEW_TRANSFORMERS and any(".attention.self." in key for key in state):
        return _OLD_TRANSFORMERS
    if known is not _AUTHORS:
        return known
    if f"{prefix}cls_token" in state:
        return _VIT
    if any(key.startswith(f"{prefix}layers_0.") for key in state):
        return _TIMM_FEATURES
    # timm since 0.9; before, its names were the authors'
    merging = prefix + "layers.{}.downsample.reduction.weight"
    moved = merging.format(1) in state and merging.format(0) not in state
    return _TIMM if moved or f"{prefix}head.fc.weight" in state else _AUTHORS


def layout_for(name: str, family: str, simmim: bool) -> Layout:
    """The layout to write, with the prefix of the library's model; ValueError: it has none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    layout = LAYOUTS[name]
    if simmim and layout is _TIMM_FEATURES:
        raise ValueError(f"layout: {name} has no names for what SimMIM adds, take its encoder")
    if family == "vit":
        if layout is not _TIMM:
            raise ValueError(f"layout: ViT has the names of timm alone, got {name!r}")
        layout = _VIT
    if family == "swinv2" and layout is _NEW_TRANSFORMERS:
        layout = _OLD_TRANSFORMERS  # transformers 5 has renamed V1 alone
    if layout.name.startswith("transformers"):
        return replace(layout, prefix=f"{family}.")
    return replace(layout, prefix="encoder." if simmim else "")


def _renamed(name: str, layout: Layout) -> str:
    for pattern, replacement in layout.rules:
        if (match := re.search(pattern, name)) is None:
            continue
        stage = int(match[1]) if "{" in replacement else 0
        numbered = replacement.format(next=stage + 1, blocks=2 * stage + 1, merging=2 * stage + 2)
        name = re.sub(pattern, numbered, name)
    return name


def pieces(name: str, layout: Layout) -> tuple[Piece, ...]:
    """Where our tensor `name`, of a Swin, a ViT or a SimMIM, lies in a checkpoint of `layout`."""

    def placed(name: str) -> str:
        renamed = _renamed(name, layout)
        inside = "" if renamed.startswith(layout.outside) else layout.prefix
        return layout.wrapper + inside + renamed

    name = name.removeprefix("encoder.")
    block, _, last = name.rpartition("attn.")
    if last in ("q_bias", "v_bias"):
        third = 0 if last == "q_bias" else 2
        if layout.packed_bias:
            return (Piece(placed(f"{block}attn.qkv.bias"), third),)
        if layout.qkv:
            return (Piece(f"{placed(block)}{layout.qkv[third]}.bias"),)
    if layout.qkv and last in ("qkv.weight", "qkv.bias"):
        kind = last.removeprefix("qkv.")
        return tuple(Piece(f"{placed(block)}{layer}.{kind}") for layer in layout.qkv)
    return (Piece(placed(name)),)
