"""Inference runtimes beside PyTorch: one ONNX file of the stock model, run by each of them.

They are optional (`pip install '.[peers]'`); a runtime that is missing has a row with the reason.
Each is a module that is called as the model is, so that checks and clocks treat all forms alike.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

INPUT = "images"
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")


def export(stock: nn.Module, images: Tensor, folder: Path) -> Path:
    """An ONNX file of the model for this very shape, in fp32 whatever the dtype."""
    path = folder / "model.onnx"
    inputs = (images.float(),)
    program = torch.onnx.export(
        stock.float().eval(), inputs, input_names=[INPUT], dynamo=True, verbose=False
    )
    assert program is not None
    program.save(str(path))
    return path


class OnnxRuntime(nn.Module):
    """ONNX Runtime's CPU kernels, with as many threads as torch has."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        # else its threads go on spinning into the next form's time
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(logits)


class OpenVino(nn.Module):
    """OpenVINO's CPU plugin in the precision of `dtype`, with as many threads as torch has."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:  # it would compute in f32
            raise RuntimeError(f"no bf16 on this CPU, but {', '.join(sorted(able))}")
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_HYPER_THREADING": True,  # or fewer threads than asked for, on virtual CPUs
        }
        self.model = core.compile_model(core.read_model(str(path)), "CPU", options)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images.float().numpy(), share_inputs=True, share_outputs=False)[0]
        return torch.from_numpy(logits)


class Runtime(NamedTuple):
    make: Callable[[Path, torch.dtype], nn.Module]
    packages: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]

    def why_not(self, dtype: torch.dtype) -> str | None:
        """None if it can run a model of this dtype, else the reason."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: pip install {' '.join(missing)}"
        if dtype not in self.dtypes:
            names = ", ".join(str(x).removeprefix("torch.") for x in self.dtypes)
            return f"computes in {names}, not in {str(dtype).removeprefix('torch.')}"
        return None


RUNTIMES = {
    "ONNX Runtime": Runtime(OnnxRuntime, PACKAGES[:3], (torch.float32,)),
    "OpenVINO": Runtime(OpenVino, (*PACKAGES[:2], "openvino"), (torch.float32, torch.bfloat16)),
}


def versions() -> str:
    """Of the packages that are installed, in words."""
    there = (name for name in PACKAGES if importlib.util.find_spec(name) is not None)
    found = [f"{name} {importlib.metadata.version(name)}" for name in there]
    return ", ".join(found) or "none"
