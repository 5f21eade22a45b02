"""Cases whose kernels are compiled ahead of time: what people run, and the rarer classes beside."""

from __future__ import annotations

from swin_kernels.testing import Case

_SWIN = Case(
    batch=64,
    size=(56, 56),
    window=(7, 7),
    shift=(3, 3),
    heads=3,
    head_dim=32,
    packed=True,
    bias="table",
    layout="contiguous",
)
_WINDOW_12 = _SWIN.but(size=(96, 96), window=(12, 12), shift=(6, 6))
_COSINE = {"cosine": True, "bias": "dense"}
_VIDEO = _SWIN.but(size=(8, 56, 56), window=(2, 7, 7), shift=(1, 3, 3), bias="table+index")
_WINDOW_7X7X7 = _VIDEO.but(size=(14, 56, 56), window=(7, 7, 7), shift=(3, 3, 3))
CASES = {
    "swin": _SWIN,
    "swin, unshifted": _SWIN.but(shift=(0, 0), bias="table+index"),
    "swin, padded": _SWIN.but(size=(64, 64), bias="table+index", pads=True, pad_order="roll-pad"),
    "swin, window 12": _WINDOW_12,
    "swin v2, window 8": _SWIN.but(size=(64, 64), window=(8, 8), shift=(4, 4), **_COSINE),
    "swin v2, window 24": _SWIN.but(size=(96, 96), window=(24, 24), shift=(12, 12), **_COSINE),
    "video swin": _SWIN.but(size=(16, 56, 56), window=(8, 7, 7), shift=(0, 3, 3)),
    "swin unetr": _WINDOW_7X7X7.but(batch=4, size=(48, 48, 48), head_dim=16, pads=True),
    "swin ir": _SWIN.but(size=(64, 64), window=(8, 8), shift=(4, 4), heads=6, head_dim=30),
    **{f"head dim {n}": _SWIN.but(head_dim=n) for n in (64, 128)},
    "window 4": _SWIN.but(window=(4, 4), shift=(2, 2)),
    "vit": _SWIN.but(size=(197,), window=(197,), shift=(0,), head_dim=64, bias="none"),
    "dropout": _SWIN.but(dropout_p=0.1),
    "separate, masked": _SWIN.but(shift=(0, 0), bias="dense", mask="regions", packed=False),
    "video swin, window 2": _VIDEO,
}

# not in the report: a case for each further class of problems that layouts know, and mixtures
_ADDED = {"pads": True, "size": (60, 60)}
RARE = {
    "swin, by index": _SWIN.but(bias="table+index"),
    "swin, no bias": _SWIN.but(bias="none"),
    "dense, masked": _SWIN.but(bias="dense", mask="regions"),
    "padded, masked": _SWIN.but(mask="regions", **_ADDED),
    "cosine, masked": _SWIN.but(mask="regions", **_COSINE),
    "cosine, padded": _SWIN.but(**_COSINE, **_ADDED),
    "cosine, dropout": _SWIN.but(dropout_p=0.1, **_COSINE),
    "everything": _SWIN.but(mask="regions", dropout_p=0.1, **_COSINE, **_ADDED),
    "window 6": _SWIN.but(window=(6, 6), size=(60, 60)),
    "window 5, cosine": _SWIN.but(window=(5, 5), shift=(2, 2), size=(60, 60), **_COSINE),
    "window 12, everything": _WINDOW_12.but(
        size=(100, 100), pads=True, mask="regions", dropout_p=0.1, **_COSINE
    ),
    "window 12, head dim 128": _WINDOW_12.but(head_dim=128),
    "window 7×7×7": _WINDOW_7X7X7,
    "128 tokens": _VIDEO.but(size=(16, 32, 32), window=(2, 8, 8), shift=(0, 4, 4)),
    "98 tokens, cosine": _VIDEO.but(**_COSINE),
    "98 tokens, head dim 64": _VIDEO.but(bias="table", head_dim=64),
    "98 tokens, everything": _VIDEO.but(size=(9, 60, 60), pads=True, mask="regions", **_COSINE),
    "98 tokens, masked": _VIDEO.but(mask="regions"),
    "98 tokens, strided": _VIDEO.but(layout="strided"),
    "144 tokens, head dim 128, padded, masked": _WINDOW_12.but(
        size=(100, 100), head_dim=128, pads=True, mask="regions"
    ),
    **{f"head dim {n}": _SWIN.but(head_dim=n) for n in (16, 24, 30, 48, 80)},
    **{f"value dim {n}": _SWIN.but(packed=False, value_dim=n) for n in (16, 64)},
    "head dim 64, cosine": _SWIN.but(head_dim=64, **_COSINE),
    "head dim 64, dropout": _SWIN.but(head_dim=64, dropout_p=0.1),
    "head dim 64, padded": _SWIN.but(head_dim=64, **_ADDED),
    "head dim 128, cosine": _SWIN.but(head_dim=128, **_COSINE),
    "head dim 128, masked": _SWIN.but(head_dim=128, mask="regions"),
    "head dim 128, padded": _SWIN.but(head_dim=128, **_ADDED),
    "head dim 128, dropout": _SWIN.but(head_dim=128, dropout_p=0.1),
    "head dim 128, everything": _SWIN.but(
        head_dim=128, mask="regions", dropout_p=0.1, **_COSINE, **_ADDED
    ),
    "head dim 64, strided": _SWIN.but(head_dim=64, layout="strided"),
    "channels inside": _SWIN.but(layout="channels-inside"),
    "strided": _SWIN.but(layout="strided"),
}
