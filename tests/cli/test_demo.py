"""The demo: once whole, in a process of its own; its parts on a small model."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from command_lines import PNG_MAGIC, output_of, run_python

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
timm = pytest.importorskip("timm")

from swin_kernels.backends import native
from swin_kernels.cli import command, demo, inputs, memory
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.patch import patch
from swin_kernels.testing import timing


@pytest.fixture(scope="module")
def small():
    """A Swin of two stages, 4×4 windows on 16×16 and 8×8 maps, as the demo holds it."""
    torch.manual_seed(0)
    module = timm.models.swin_transformer.SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=10,
    )
    inputs.spread_out(module)
    weights = "random weights"
    return inputs.Model(module.eval(), 32, 32, (0.5,) * 3, (0.5,) * 3, 0.9, False, weights)


@pytest.fixture
def prepared(small, tmp_path):
    photo = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(1))
    patched = copy.deepcopy(small.module)
    report = patch(patched)
    images = inputs.make_batch(photo, small, 3)
    picture = tmp_path / "small.png"
    return demo.Prepared(
        "small", Path("photo.png"), photo, images, small, patched, report, "cpu", 2, picture
    )


@pytest.fixture
def outcomes(prepared):
    """Of patched, stock and exact."""
    exact = copy.deepcopy(prepared.model.module).double()
    modules = (prepared.patched, prepared.model.module, exact)
    return [timing.run_once(module, prepared.images) for module in modules]


@pytest.mark.slow
def test_whole_demo_prints_its_tables_and_writes_the_picture(tmp_path):
    command = ("-m", "swin_kernels", "demo", "--rounds", 1, "--batch", 1, "--threads", 1)
    done = run_python(*command, "--out", tmp_path, HF_HUB_OFFLINE="1")
    rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.count("|") > 3}
    costs = {*timing.STEPS, "attention alone", *(f"peak memory, {x}" for x in timing.STEPS)}
    assert {"logits", "gradients", "each gradient"} | costs <= rows
    first, _, told = done.stdout.partition("\n")
    for fact in (f"torch {torch.__version__}", "1 thread ", "backend "):
        assert fact in first
    for fact in ("replaced in 12 of 12 blocks", "173 parameters", "Within the error rule"):
        assert fact in told
    assert done.stdout.count("\n") <= 33  # with what `make` prints before it at most 40
    assert "Traceback" not in done.stderr
    (picture,) = tmp_path.iterdir()
    assert picture.name == "swin_tiny_patch4_window7_224.png"
    assert picture.read_bytes().startswith(PNG_MAGIC)


def test_counted_backends_sees_the_path_and_leaves_no_trace(prepared):
    expected = "cpu" if native.CPU_OBJECT.error is None else "reference"
    with timing.counted_backends() as calls:
        timing.inference_step(prepared.patched, prepared.images)
    assert dict(calls) == {expected: 4}
    timing.inference_step(prepared.patched, prepared.images)
    assert dict(calls) == {expected: 4}
    assert all("forward" not in vars(backend) for backend in BACKENDS.values())


def test_spread_out_weights_give_every_bias_table_a_gradient(prepared):
    grads = timing.run_once(prepared.model.module, prepared.images).grads
    tables = [grad for name, grad in grads.items() if name.endswith("bias_table")]
    assert len(tables) == 4
    assert all(grad.abs().max() > 1e-6 for grad in tables)


def test_patched_keeps_the_error_rule(outcomes):
    assert [d.complaint for d in timing.compare(*outcomes)] == [None] * 3


def test_wrong_gradient_of_one_small_parameter_is_found(outcomes):
    patched, stock, exact = outcomes
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert exact.grads[name].abs().max() < 1e-2 * max(g.abs().max() for g in exact.grads.values())
    patched.grads[name].mul_(1.001)
    logits, _, relative = timing.compare(patched, stock, exact)
    assert logits.complaint is None
    assert relative.complaint is not None
    assert relative.patched_exact == pytest.approx(1e-3, rel=0.1)


def test_nan_is_beyond_the_error_rule(outcomes):
    outcomes[0].logits[0, 0] = float("nan")
    assert timing.compare(*outcomes)[0].complaint is not None


def _have_measured(monkeypatch, complaint: str | None) -> None:
    differences = [timing.Difference("logits", 1e-7, 1e-7, 1e-7, 2.0, complaint)]
    results = differences, {"inference": {"stock": 0.2, "patched": 0.1}}, ["a remark"]
    monkeypatch.setattr(demo, "_measure", lambda p, console: results)


def test_run_returns_1_and_says_so_beyond_the_error_rule(monkeypatch, prepared, capsys):
    _have_measured(monkeypatch, "error=1 exceeds")
    out = output_of(capsys, demo.run, prepared, code=1)
    assert "beyond the error rule: error=1 exceeds" in out
    assert "Within the error rule" not in out


def test_run_says_that_the_reference_backend_is_not_faster(monkeypatch, prepared, capsys):
    _have_measured(monkeypatch, None)
    out = output_of(capsys, demo.run, prepared._replace(backend="reference"))
    assert "backend reference" in out
    assert "is not faster" in out
    assert "| 200 ms |  100 ms |            2.00 |" in out
    assert "a remark" in out


def test_picture_shows_the_last_shifted_block(prepared):
    name, grid = inputs.last_shifted_grid(prepared.model.module)
    assert name == "layers.1.blocks.1"
    assert (grid.size, grid.window, grid.shift) == ((8, 8), (4, 4), (2, 2))
    assert str(prepared.picture) in demo._draw(prepared)
    assert prepared.picture.stat().st_size > 0


def test_times_are_taken_in_turn_and_modules_left_in_evaluation_mode(prepared):
    modules, ticks = {"stock": prepared.model.module, "patched": prepared.patched}, []
    times = timing.time_in_turn(
        "training step", modules, prepared.images, 2, lambda: ticks.append(1)
    )
    assert set(times) == set(modules)
    assert all(len(x) == 2 and min(x) > 0 for x in times.values())
    assert len(ticks) == 6
    assert not any(
        m.training or any(p.grad is not None for p in m.parameters()) for m in modules.values()
    )


def test_process_that_measures_memory_and_fails_gives_its_last_words():
    with pytest.raises(RuntimeError, match="no_such_model"):
        memory.peak_memory(memory.Spec.of("no_such_model", torch.zeros(1)), ("stock",))


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (301, 200)])
def test_crop_has_the_size_asked_for(size):
    assert inputs.central_crop(torch.rand(3, 37, 61), *size, 0.9).shape == (3, *size)


def test_photo_is_a_file_that_a_package_ships():
    photo = inputs.find_photo()
    pixels = inputs.read_photo(photo)
    assert pixels.shape[0] == 3
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_without_a_photo_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(inputs, "SHIPPED", {"no_such_package_here": ("x.png",)})
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        inputs.find_photo()


def test_without_a_package_the_error_says_what_to_install():
    needs = {"torch": "torch", "no_such_package_here": "some-package"}
    with pytest.raises(ImportError, match="the demo needs some-package: pip install some-package"):
        command.check_packages(needs, "the demo")


def test_attention_clock_sees_part_of_every_pass_and_leaves_no_trace(prepared):
    modules = [prepared.model.module, prepared.patched]
    with contextlib.ExitStack() as stack:
        clocks = [stack.enter_context(timing.attention_clock(module)) for module in modules]
        with timing.counted_backends() as calls:
            times = timing.time_in_turn(
                "inference", dict(zip("ab", modules)), prepared.images, 2, lambda: None
            )
    assert sum(calls.values()) == 4 * 3  # the patched model stays on its kernels
    for seconds, attention in zip(times.values(), clocks):
        assert len(attention) == 3
        assert all(0 < part < whole for part, whole in zip(attention[1:], seconds))
    for module in modules:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(("slowest", "unreliable"), [(1.2, False), (1.5, True)])
def test_times_that_vary_are_said_to_be_unreliable(monkeypatch, prepared, slowest, unreliable):
    samples = {name: [1.0, 1.0, 1.0, slowest, slowest] for name in ("stock", "patched")}
    monkeypatch.setattr(timing, "time_in_turn", lambda *_: samples)
    monkeypatch.setattr(timing, "attention_clock", lambda _: contextlib.nullcontext([9.0, 0.5]))
    monkeypatch.setattr(
        memory, "peak_memory", lambda *_: {x: dict.fromkeys(timing.STEPS, 1) for x in samples}
    )
    _, costs, remarks = demo._measure(prepared, command.make_console())
    assert costs["inference"] == {"stock": 1.0, "patched": 1.0}
    assert costs["attention alone"] == {"stock": 0.5, "patched": 0.5}
    assert any("Unreliable times" in remark for remark in remarks) is unreliable


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(command, "_FIRST_LINE", -1.0)
    console = command.make_console()
    with command.progress(console, 1) as bar:
        bar.say("time, inference")
        monkeypatch.setattr(bar, "due", 1e9)
        bar.tick()
    assert capsys.readouterr().out == "time, inference, step 0 of 12, 0 s\n"
