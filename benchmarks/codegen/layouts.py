"""Cases whose kernels are compiled ahead of time: what people run, and the rarer classes beside."""

from __future__ import annotations

from swin_kernels.testing import Case

_MODEL = {"batch": 64, "heads": 3, "head_dim": 32, "packed": True, "layout": "contiguous"}
CASES = {
    "swin": Case(size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **_MODEL),
    "swin, unshifted": Case(size=(56, 56), window=(7, 7), bias="table+index", **_MODEL),
    "swin, padded": Case(
        size=(64, 64),
        window=(7, 7),
        shift=(3, 3),
        bias="table+index",
        pads=True,
        pad_order="roll-pad",
        **_MODEL,
    ),
    "swin, window 12": Case(size=(96, 96), window=(12, 12), shift=(6, 6), bias="table", **_MODEL),
    "swin v2, window 8": Case(
        size=(64, 64), window=(8, 8), shift=(4, 4), bias="dense", cosine=True, **_MODEL
    ),
    "swin v2, window 24": Case(
        size=(96, 96), window=(24, 24), shift=(12, 12), bias="dense", cosine=True, **_MODEL
    ),
    "video swin": Case(
        size=(16, 56, 56), window=(8, 7, 7), shift=(0, 3, 3), bias="table", **_MODEL
    ),
    "swin unetr": Case(
        size=(48, 48, 48),
        window=(7, 7, 7),
        shift=(3, 3, 3),
        bias="table+index",
        pads=True,
        **{**_MODEL, "batch": 4, "head_dim": 16},
    ),
    "swin ir": Case(
        size=(64, 64),
        window=(8, 8),
        shift=(4, 4),
        bias="table",
        **{**_MODEL, "heads": 6, "head_dim": 30},
    ),
    "head dim 64": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **{**_MODEL, "head_dim": 64}
    ),
    "head dim 128": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **{**_MODEL, "head_dim": 128}
    ),
    "window 4": Case(size=(56, 56), window=(4, 4), shift=(2, 2), bias="table", **_MODEL),
    "vit": Case(size=(197,), window=(197,), **{**_MODEL, "head_dim": 64}),
    "dropout": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", dropout_p=0.1, **_MODEL
    ),
    "separate, masked": Case(
        size=(56, 56),
        window=(7, 7),
        bias="dense",
        mask="regions",
        **{**_MODEL, "packed": False},
    ),
}

_SWIN = CASES["swin"]
_VIDEO = Case(size=(8, 56, 56), window=(2, 7, 7), shift=(1, 3, 3), bias="table+index", **_MODEL)
CASES["video swin, window 2"] = _VIDEO

# not in the report: a case for each further class of problems that layouts know, and mixtures
_ADDED = {"pads": True, "size": (60, 60)}
_COSINE = {"cosine": True, "bias": "dense"}
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
    "window 12, everything": _SWIN.but(
        window=(12, 12),
        shift=(6, 6),
        mask="regions",
        dropout_p=0.1,
        **_COSINE,
        **{**_ADDED, "size": (100, 100)},
    ),
    "window 12, head dim 128": CASES["swin, window 12"].but(head_dim=128),
    "window 7×7×7": Case(
        size=(14, 56, 56), window=(7, 7, 7), shift=(3, 3, 3), bias="table+index", **_MODEL
    ),
    "128 tokens": _VIDEO.but(size=(16, 32, 32), window=(2, 8, 8), shift=(0, 4, 4)),
    "98 tokens, cosine": _VIDEO.but(**_COSINE),
    "98 tokens, head dim 64": _VIDEO.but(bias="table", head_dim=64),
    "98 tokens, everything": _VIDEO.but(size=(9, 60, 60), pads=True, mask="regions", **_COSINE),
    "98 tokens, masked": _VIDEO.but(mask="regions"),
    "98 tokens, strided": _VIDEO.but(layout="strided"),
    "144 tokens, head dim 128, padded, masked": CASES["swin, window 12"].but(
        size=(100, 100), head_dim=128, pads=True, mask="regions"
    ),
    "head dim 16": _SWIN.but(head_dim=16),
    "head dim 24": _SWIN.but(head_dim=24),
    "head dim 30": _SWIN.but(head_dim=30),
    "head dim 48": _SWIN.but(head_dim=48),
    "head dim 80": _SWIN.but(head_dim=80),
    "value dim 16": _SWIN.but(packed=False, value_dim=16),
    "value dim 64": _SWIN.but(packed=False, value_dim=64),
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
