"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import logging
from unittest.mock import Mock

import pytest
import torch
from command_lines import last_line_of, run, run_python
from frames import frames_open_at

from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.backends import native
from swin_kernels.ops import dispatch
from swin_kernels.ops.dispatch import BACKENDS, REFERENCE, choose, reasons_against
from swin_kernels.problem import Operands, Problem

QKV = torch.randn(1, 8, 8, 3, 2, 8)


def _problem(**options):
    return Problem.checked(Operands(QKV), **{"window_size": 4, **options})


@pytest.fixture(autouse=True)
def _no_default(monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", None)
    monkeypatch.setattr(dispatch, "_already_logged", set())


def _refuse(monkeypatch, *names, reason="it is Sunday"):
    for name in names:
        monkeypatch.setattr(BACKENDS[name], "why_not", lambda problem: reason)


def test_backends_stand_in_order_of_preference():
    assert list(BACKENDS) == ["cpu", "triton", "cuda", "reference"]
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_none_takes_the_fused_kernels_for_cpu_tensors(cpu_kernels):
    assert choose(_problem()).name == "cpu"


def test_name_takes_that_backend(backend_name):
    assert choose(_problem(), backend_name).name == backend_name


@pytest.mark.parametrize("grad", [False, True])
def test_named_backend_alone_is_called(backend_name, grad, monkeypatch):
    methods = {}
    for name, backend in BACKENDS.items():
        for method in ("forward", "backward"):
            methods[name, method] = Mock(wraps=getattr(backend, method))
            monkeypatch.setattr(backend, method, methods[name, method])
    qkv = QKV.clone().requires_grad_(grad)
    out = shifted_window_attention_qkvpacked(qkv, 4, backend=backend_name)
    if grad:
        out.sum().backward()
    counts = {key: method.call_count for key, method in methods.items() if method.called}
    assert {name for name, _ in counts} == {backend_name}
    if backend_name == "cpu":
        assert list(counts) == [("cpu", "forward"), ("cpu", "backward")][: 1 + grad]
        assert set(counts.values()) == {1}


def test_name_that_cannot_run_raises_with_its_reason_and_never_falls_back(monkeypatch):
    _refuse(monkeypatch, "cpu")
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run B=1 map=8×8 .*\n.*Sunday"):
        shifted_window_attention_qkvpacked(QKV, 4, backend="cpu")


def test_no_backend_raises_with_every_reason(monkeypatch):
    _refuse(monkeypatch, *BACKENDS)
    with pytest.raises(NotImplementedError) as caught:
        shifted_window_attention_qkvpacked(QKV, 4)
    for name in BACKENDS:
        assert f"{name}: it is Sunday" in str(caught.value)


def test_reasons_name_every_backend(monkeypatch):
    _refuse(monkeypatch, "cpu")
    reasons = reasons_against(_problem())
    assert list(reasons) == list(BACKENDS)
    assert reasons["cpu"] == "it is Sunday"
    assert "_C_cuda is not built" in reasons["cuda"] or "got cpu" in reasons["cuda"]
    assert "triton is not installed" in reasons["triton"] or "got cpu" in reasons["triton"]
    assert reasons["reference"] is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_choice_of_the_reference_is_logged_once_with_the_reasons(
    compiled, monkeypatch, caplog, fresh_dynamo
):
    def attend(qkv):
        return shifted_window_attention_qkvpacked(qkv, 4)

    _refuse(monkeypatch, "cpu")
    with caplog.at_level(logging.WARNING, logger="swin_kernels"):
        function = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
        for _ in range(3):
            out = function(QKV)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "swin_kernels"]
    assert "reference" in message
    assert message.count("cpu: it is Sunday") == 1
    assert torch.equal(out, shifted_window_attention_qkvpacked(QKV, 4, backend="reference"))


def test_reference_asked_for_by_name_is_not_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="swin_kernels"):
        shifted_window_attention_qkvpacked(QKV, 4, backend="reference")
    assert not caplog.records


def test_default_name_is_used_and_a_given_one_goes_first(monkeypatch, cpu_kernels):
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", "reference")
    assert choose(_problem()) is REFERENCE
    assert choose(_problem(), "cpu").name == "cpu"


_WHICH = """
import torch
from swin_kernels import shifted_window_attention_qkvpacked
out = shifted_window_attention_qkvpacked(torch.randn(1, 4, 3, 1, 8, requires_grad=True), 4)
print(type(out.grad_fn).__name__)
"""


@pytest.mark.parametrize("value", ["", "cpu", "reference"])
def test_environment_variable_sets_the_default(value, cpu_kernels):
    node = last_line_of(_WHICH, SWIN_KERNELS_BACKEND=value)
    assert ("ShiftedWindowAttentionFunction" in node) == (value != "reference")


def test_unknown_name_in_the_environment_is_a_value_error():
    said = run_python("-c", _WHICH, code=1, SWIN_KERNELS_BACKEND="tpu").stderr
    assert "ValueError: backend: expected one of" in said
    assert "got 'tpu'" in said


def test_cpu_kernels_refuse_other_devices():
    operands = Operands(QKV.to("meta"))
    problem = Problem.checked(operands, 4)
    assert "CPU tensors, got meta" in BACKENDS["cpu"].why_not(problem)


def test_meta_tensors_give_shapes():
    q, k, v = torch.empty(3, 2, 7, 7, 2, 8, device="meta").unbind()
    out = shifted_window_attention(q, k, v, 4, 2)
    assert out.device.type == "meta"
    assert out.shape == (2, 7, 7, 2, 8)


def test_missing_object_keeps_its_reason():
    loaded = native._load("_C_absent", "CPU")
    assert loaded.path is None
    assert "_C_absent is not built" in loaded.error
    assert "build_ext" in loaded.error


def test_object_that_does_not_load_keeps_its_reason(tmp_path, monkeypatch):
    (tmp_path / "_C_broken.abi3.so").write_bytes(b"not an object")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    loaded = native._load("_C_broken", "CPU")
    assert loaded.path == tmp_path / "_C_broken.abi3.so"
    assert "_C_broken.abi3.so did not load" in loaded.error


def test_object_without_its_operations_keeps_its_reason(tmp_path, monkeypatch):
    """One of other sources: it loads, and registers something else or nothing."""
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    made = tmp_path / "_C_stale.abi3.so"
    run("cc", "-shared", "-fPIC", empty, "-o", made)
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    loaded = native._load("_C_stale", "CPU", "no_such_operation")
    assert loaded.path == made
    assert "_C_stale.abi3.so lacks swin_kernels::no_such_operation" in loaded.error
    # an operation that is there, but not for this kind of device
    loaded = native._load("_C_stale", "PrivateUse1", "window_attention_forward")
    assert "lacks swin_kernels::window_attention_forward: build it again" in loaded.error


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "kernel"), [("cpu", ""), ("reference", "softmax")], ids=["cpu", "reference"]
)  # a profile has no name for the call of an op
def test_a_kernel_is_at_most_six_frames_away(name, kernel, trained, cpu_kernels):
    """As are Triton's: test_triton_repeated.py."""
    qkv = torch.randn(1, 4, 4, 3, 2, 8, requires_grad=trained)
    _assert_six_frames(name, kernel, qkv)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_the_mode_s_kernel_is_at_most_six_frames_away(fused, trained):
    """Of CUDA C++ too, where it is emulated or on a GPU."""
    if fused == "triton":
        pytest.skip("test_triton_repeated.py counts, where the launches are direct")
    _assert_six_frames(fused, "", torch.randn(1, 4, 4, 3, 2, 8, requires_grad=trained))


def _assert_six_frames(name: str, kernel: str, qkv: torch.Tensor) -> None:
    frames = frames_open_at(
        kernel, lambda: shifted_window_attention_qkvpacked(qkv, 2, backend=name)
    )
    assert frames[0] == "shifted_window_attention_qkvpacked"
    assert len(frames) <= 6, frames
