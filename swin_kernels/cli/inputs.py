"""What the demo runs on: a photograph that an installed package ships, and a timm model by name."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import socket
import threading
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_kernels.geometry import Grid

# package -> photographs inside it, best first; files of the wheels, so nothing is downloaded
SHIPPED = {
    "skimage": ("data/chelsea.png", "data/astronaut.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/flower.jpg", "datasets/images/china.jpg"),
}
_CONNECT_SECONDS = 3.0


class Model(NamedTuple):
    """A timm model with what it expects of an image."""

    module: nn.Module
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float  # share of the image that the central crop keeps
    pretrained: bool
    weights: str  # in words


def find_photo(path: str | None = None) -> Path:
    """The file at `path`, or the first photograph that an installed package ships.

    FileNotFoundError says what to install or which path is wrong.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--image: expected a photo, but there is no file {path!r}")
        return Path(path)
    for package, names in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for name in names:
                if (photo := Path(folder) / name).is_file():
                    return photo
    raise FileNotFoundError(
        "no photograph found: pip install scikit-image (or scikit-learn), or pass --image"
    )


def read_photo(path: Path) -> Tensor:
    """(3, height, width) in [0, 1]; ValueError if the file is no image."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = numpy.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"--image: {path} is not an image; expected a PNG or JPEG") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image: {path} is an image that cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def central_crop(photo: Tensor, height: int, width: int, keep: float = 1.0) -> Tensor:
    """(3, height, width): the middle of the photograph, `keep` of its shorter side."""
    scale = max(height / photo.shape[1], width / photo.shape[2]) / keep
    size = [
        max(round(side * scale), least) for side, least in zip(photo.shape[1:], (height, width))
    ]
    scaled = F.interpolate(photo[None], size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[0, :, top : top + height, left : left + width].clamp(0, 1)


def make_batch(photo: Tensor, model: Model, batch: int) -> Tensor:
    """(B, 3, height, width), normalised: the central crop, its mirror image, then closer crops."""
    crops = []
    for i in range(batch):
        crop = central_crop(photo, model.height, model.width, model.crop * 0.9 ** (i // 2))
        crops.append(crop.flip(-1) if i % 2 else crop)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.mean, model.std))
    return ((torch.stack(crops) - mean) / std).contiguous()


def check_name(name: str) -> None:
    """ValueError for an architecture or a pretrained tag that timm does not know."""
    import timm

    if not timm.is_model(name):
        known = timm.list_models("swin*")
        # a name half typed is near those that begin like it
        known.sort(key=lambda x: -difflib.SequenceMatcher(None, name, x[: len(name)]).ratio())
        raise ValueError(
            f"--model: timm {timm.__version__} has no {name!r}; nearest are {', '.join(known[:3])}"
        )
    architecture, dot, tag = name.partition(".")
    # an old name has no tags of its own, but those of the model that it stands for
    current = timm.models.get_deprecated_models().get(architecture, architecture)
    if current is None:
        raise ValueError(f"--model: timm {timm.__version__} has removed {architecture!r}")
    current = current.partition(".")[0]
    try:
        timm.models.get_pretrained_cfg(f"{current}{dot}{tag}")
    except RuntimeError as error:
        known = [x for x in timm.list_pretrained(f"{current}.*") if x.startswith(f"{current}.")]
        tags = ", ".join(x.partition(".")[2] for x in known) or "none"
        raise ValueError(
            f"--model: timm {timm.__version__} has no pretrained tag {tag!r} of {architecture}; "
            f"expected one of {tags}"
        ) from error


def _hub_is_reachable() -> bool:
    """Whether the model hub answers at once; resolving its name alone can take a minute."""
    import huggingface_hub.constants as hub

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    address = urllib.parse.urlsplit(hub.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    opened = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname, port), _CONNECT_SECONDS).close()
            opened.set()

    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(_CONNECT_SECONDS)
    return opened.is_set()


def _with_pretrained_weights(name: str) -> nn.Module:
    """The model with weights from the cache or the hub; any exception if they cannot be had."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")  # read when huggingface_hub is imported
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    import huggingface_hub.constants as hub
    import timm

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    before = hub.HF_HUB_OFFLINE
    offline = before or not _hub_is_reachable()
    hub.HF_HUB_OFFLINE = offline  # the cache still answers
    try:
        return timm.create_model(name, pretrained=True)
    except OSError as error:
        if offline:
            raise OSError("hub not reachable, not in its cache") from error
        raise
    finally:
        hub.HF_HUB_OFFLINE = before


def spread_out(module: nn.Module, seed: int = 0) -> None:
    """Moves fresh weights to where trained ones are, in place.

    A fresh V2 block multiplies its attention by zero and a fresh table is nearly flat: there would
    be nothing to compare.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("relative_position_bias_table"):
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
                continue
            if p.ndim == 1 and name.endswith("weight") and not p.any():
                p.fill_(1.0)
            p.add_(0.02 * torch.randn(p.shape, generator=generator))


def is_own(name: str) -> bool:
    """Whether `name` is `module:function`, what makes a model of the user's own."""
    return ":" in name


def _own_model(name: str) -> nn.Module:
    """What `module:function` returns when it is called."""
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the code is the user's, and so is its error
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"--model: cannot call {name!r}: {cause}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model: {name!r} returned {type(made).__name__}, no torch.nn.Module")
    return made


def create(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """The timm model called `name` with fresh weights, for images of another size if one is given.

    Or what `module:function` makes, which has its own size. ValueError for a size that a model
    cannot have, and for what is no model.
    """
    if is_own(name):
        return _own_model(name)
    import timm

    if size is None:
        return timm.create_model(name, pretrained=False)
    try:
        return timm.create_model(name, pretrained=False, img_size=size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"--size: {name} cannot be made for {size[0]}×{size[1]}: {cause}"
        ) from error


def fresh_model(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """`create` with the same weights every time, spread out; those of a user's own as they are."""
    torch.manual_seed(0)
    module = create(name, size)
    if not is_own(name):
        spread_out(module)
    return module


def load_model(name: str) -> Model:
    """The timm model called `name` in evaluation mode, pretrained if the weights can be had.

    ValueError for a name that timm does not know.
    """
    import timm

    check_name(name)
    try:
        module = _with_pretrained_weights(name)
        pretrained, weights = True, "pretrained weights"
    except Exception as error:  # of whatever kind: the demo runs without them
        module = fresh_model(name)
        cause = str(error).strip().partition("\n")[0].partition(". ")[0]
        pretrained, weights = False, f"random weights (pretrained ones: {cause})"
    facts: dict[str, Any] = timm.data.resolve_data_config(model=module)
    _, height, width = facts["input_size"]
    mean, std, crop = facts["mean"], facts["std"], facts["crop_pct"]
    return Model(module.eval(), height, width, mean, std, crop, pretrained, weights)


def last_shifted_grid(module: nn.Module) -> tuple[str, Grid] | None:
    """Name and grid of the last timm block whose windows are shifted; None if there is none."""
    found = None
    for name, block in module.named_modules():
        size = getattr(block, "input_resolution", None) or getattr(block, "feat_size", None)
        window, shift = getattr(block, "window_size", None), getattr(block, "shift_size", None)
        if size and window and shift and any(shift):
            found = name, Grid.checked(size, window, shift, pad_order="roll-pad")
    return found
