"""patch, unpatch, patched, explain: what they change, what they say, what they leave alone."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from patch_models import blocks_of, fused_blocks, image, small_block, small_model
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn

import swin_kernels
from swin_kernels import explain, patch, patched, unpatch
from swin_kernels.backends import native
from swin_kernels.ops.dispatch import BACKENDS, REFERENCE
from swin_kernels.patch.source import fingerprint
from swin_kernels.problem import Operands, Problem

NAMES = tuple(f"layers.{layer}.blocks.{block}" for layer in (0, 1) for block in (0, 1))


@pytest.fixture
def model():
    return small_model("v1")


class TestReport:
    def test_names_what_was_replaced(self, model):
        report = patch(model)
        assert report.replaced == NAMES
        assert report.left == {}
        assert "replaced in 4 of 4 blocks" in str(report)
        assert NAMES[3] in str(report)

    def test_second_patch_says_already_patched(self, model):
        patch(model)
        classes = [type(block) for block in blocks_of(model)]
        report = patch(model)
        assert (report.replaced, report.already_patched) == ((), NAMES)
        assert [type(block) for block in blocks_of(model)] == classes
        assert "already patched: layers.0.blocks.0" in str(report)

    def test_is_frozen(self, model):
        with pytest.raises(AttributeError):
            patch(model).replaced = ()

    def test_of_a_bare_block_names_the_model_itself(self):
        report = patch(small_block("v1", (14, 14)))
        assert report.replaced == ("",)
        assert "(the model itself)" in str(report)


class TestBadInput:
    @pytest.mark.parametrize(
        "function",
        [patch, unpatch, lambda model: patched(model).__enter__()],
        ids=["patch", "unpatch", "patched"],
    )
    def test_non_module_raises(self, function):
        with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got str"):
            function("swin_tiny")

    def test_nothing_found_says_what_is_looked_for_and_what_came(self):
        with pytest.raises(ValueError) as raised:
            patch(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()))
        assert "timm.models.swin_transformer.SwinTransformerBlock" in str(raised.value)
        assert "Conv2d, GELU" in str(raised.value)

    def test_unknown_backend_raises_and_changes_nothing(self, model):
        with pytest.raises(ValueError, match="backend: expected one of"):
            patch(model, backend="cudnn")
        assert fused_blocks(model) == []

    def test_backend_that_cannot_run_raises_in_the_call(self, model, monkeypatch):
        monkeypatch.setattr(BACKENDS["cpu"], "why_not", lambda problem: "no compiler came by")
        patch(model, backend="cpu", level="attention")
        with pytest.raises(NotImplementedError, match="no compiler came by"):
            model(image(56, 56))


class TestUndoing:
    def test_unpatch_restores_classes_and_every_bit(self, model):
        x = image(56, 56)
        before, attributes = model(x), [set(vars(block)) for block in blocks_of(model)]
        patch(model)
        model(x)
        assert unpatch(model) == NAMES
        assert {type(block) for block in blocks_of(model)} == {SwinTransformerBlock}
        assert [set(vars(block)) for block in blocks_of(model)] == attributes
        assert torch.equal(model(x), before)

    def test_unpatch_of_a_stock_model_does_nothing(self, model):
        assert unpatch(model) == ()

    def test_patched_undoes_itself_also_when_the_body_raises(self, model):
        with patched(model) as report:
            assert len(fused_blocks(model)) == 4 == len(report.replaced)
        assert fused_blocks(model) == []
        with pytest.raises(RuntimeError), patched(model):
            raise RuntimeError
        assert fused_blocks(model) == []

    def test_patched_inside_patched_leaves_the_outer_as_it_was(self, model):
        patch(model, backend="reference")
        with patched(model, backend="cpu"):
            assert {b._swin_kernels.backend for b in fused_blocks(model)} == {"cpu"}
        assert {b._swin_kernels.backend for b in fused_blocks(model)} == {"reference"}

    def test_class_changed_after_patch_refuses_to_unpatch(self, model):
        patch(model)
        block = blocks_of(model)[1]
        block.__class__ = type("FSDPBlock", (type(block),), {})
        with pytest.raises(ValueError, match="its class was changed after patch"):
            unpatch(model)
        assert len(fused_blocks(model)) == 4


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestIdentity:
    def test_state_dict_parameters_and_buffers_stay(self, model):
        def tensors():
            listed = (model.state_dict().items(), model.named_buffers(), model.named_parameters())
            return [[(name, tensor.data_ptr()) for name, tensor in each] for each in listed]

        before = tensors()
        patch(model, backend="reference")
        assert tensors() == before

    def test_load_state_dict_goes_both_ways(self, model):
        stock = small_model("v1")
        patch(model)
        assert stock.load_state_dict(model.state_dict()) is not None
        other = small_model("v1", num_classes=10)
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        model.load_state_dict(other.state_dict())
        x = image(56, 56)
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-6)

    def test_backend_is_kept_by_each_block(self, model):
        other = small_model("v1")
        patch(model, backend="reference")
        patch(other)
        assert {b._swin_kernels.backend for b in fused_blocks(model)} == {"reference"}
        assert {b._swin_kernels.backend for b in fused_blocks(other)} == {None}

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
    def test_copies_stay_patched_with_their_backend(self, model, duplicate):
        x = image(56, 56)
        patch(model, backend="reference")
        expected = model(x)
        twin = duplicate(model)
        assert {b._swin_kernels.backend for b in fused_blocks(twin)} == {"reference"}
        assert torch.equal(twin(x), expected)
        unpatch(twin)
        assert len(fused_blocks(model)) == 4
        assert fused_blocks(twin) == []

    def test_hooks_on_the_block_and_its_layers_go_on_being_called(self, model):
        calls = []
        block = blocks_of(model)[0]
        for module in (block, block.attn.qkv, block.attn.proj):
            module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
        patch(model)
        model(image(56, 56))
        assert calls == ["Linear", "Linear", "SwinTransformerBlock"]


class TestLeftAlone:
    def test_subclass_is_left_with_the_reason(self, model):
        """Trap 8: a subclass may have changed what the method does."""

        class Mine(SwinTransformerBlock):
            pass

        block = blocks_of(model)[1]
        block.__class__ = Mine
        with pytest.warns(UserWarning, match="is a subclass of SwinTransformerBlock"):
            report = patch(model)
        assert type(block) is Mine
        assert list(report.left) == [NAMES[1]]
        assert len(report.replaced) == 3

    def test_changed_source_is_left_with_a_warning(self, model, monkeypatch):
        def _attn(self, x):
            return x

        x = image(56, 56)
        monkeypatch.setattr(SwinTransformerBlock, "_attn", _attn)
        expected = model(x)
        with pytest.warns(UserWarning, match="is not one of those tested"):
            report = patch(model)
        assert (report.replaced, tuple(report.left)) == ((), NAMES)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("method", ["forward", "_get_rel_pos_bias"])
    def test_changed_source_of_the_attention_is_seen_through_wraps(
        self, model, monkeypatch, method
    ):
        stock = getattr(WindowAttention, method)

        @functools.wraps(stock)
        def wrapper(*args, **kwargs):
            return stock(*args, **kwargs) * 2

        monkeypatch.setattr(WindowAttention, method, wrapper)
        with pytest.warns(UserWarning, match="has fingerprint"):
            assert patch(model).replaced == ()

    def test_source_that_cannot_be_read_is_left(self, model, monkeypatch):
        monkeypatch.setattr(SwinTransformerBlock, "_attn", functools.partial(print))
        with pytest.warns(UserWarning, match="cannot be read"):
            assert patch(model).replaced == ()

    def test_unpickled_beside_another_release_is_a_stock_block(self, monkeypatch):
        block, x = small_block("v1", (14, 14)), torch.randn(1, 14, 14, 16)
        expected = block(x)
        patch(block)
        stored = pickle.dumps(block)
        monkeypatch.setattr(type(block), "known_sources", {"0" * 16: "timm 99"})
        with pytest.warns(UserWarning, match="unpickled as a stock block.*timm 99"):
            loaded = pickle.loads(stored)
        assert type(loaded) is SwinTransformerBlock
        assert torch.equal(loaded(x), expected)


class TestFingerprint:
    def test_ignores_docstrings_comments_and_annotations(self):
        def bare(x, y=1):
            return x + y

        first = bare

        def bare(x: int, y: int = 1) -> int:
            """Adds."""
            # y to x
            return x + y

        assert fingerprint((first,)) == fingerprint((bare,)) is not None

    @pytest.mark.parametrize(
        "changed",
        [lambda x, y=1: x - y, lambda x, y=2: x + y, lambda x, z=1: x + z],
        ids=["body", "default", "name"],
    )
    def test_changes_with_the_code(self, changed):
        first = lambda x, y=1: x + y  # noqa: E731

        assert fingerprint((first,)) != fingerprint((changed,))


class TestExplain:
    def test_environment_lists_versions_backends_and_objects(self):
        text = explain()
        assert f"swin_kernels {swin_kernels.__version__}, torch {torch.__version__}" in text
        assert all(name in text for name in BACKENDS)
        assert native.cpu_capability() in text
        assert "SwinTransformerV2CrBlock" in text

    def test_environment_shows_why_an_object_did_not_load(self, monkeypatch):
        broken = native.LoadedObject("_C_cpu", None, "_C_cpu.abi3.so: undefined symbol: aoti_x")
        monkeypatch.setattr(native, "CPU_OBJECT", broken)
        assert "not loaded: _C_cpu.abi3.so: undefined symbol: aoti_x" in explain()

    def test_model_tells_what_patch_would_do_without_doing_it(self, model):
        blocks_of(model)[2].attn.register_forward_hook(lambda *_: None)
        text = explain(model)
        assert "3 of 4 blocks" in text
        assert f"would be replaced: {NAMES[0]}, {NAMES[1]}, {NAMES[3]}" in text
        assert f"would be left: {NAMES[2]}: its attn has hooks" in text
        assert fused_blocks(model) == []

    def test_patched_model_tells_what_its_blocks_do_now(self, model):
        patch(model, backend="reference")
        blocks_of(model)[0].attn.register_forward_hook(lambda *_: None)
        text = explain(model)
        assert "backend reference" in text
        assert f"patched, on the stock path for now: {NAMES[0]}: its attn has hooks" in text

    def test_model_without_blocks_says_so(self):
        assert "no window attention found" in explain(nn.Linear(2, 2))

    def test_call_names_the_backend_that_would_run_it(self, monkeypatch):
        query = torch.randn(1, 14, 14, 2, 8)
        assert "reference would run it, as asked for" in explain(
            query, query, query, 7, 3, backend="reference"
        )
        monkeypatch.setattr(BACKENDS["cpu"], "why_not", lambda problem: "no compiler came by")
        text = explain(query, query, query, window_size=7)
        assert "reference would run it" in text
        assert "cpu: no compiler came by" in text
        assert "cpu was asked for and cannot" in explain(query, query, query, 7, backend="cpu")

    def test_packed_call_and_problem_give_the_same(self):
        qkv = torch.randn(1, 14, 14, 3, 2, 8)
        problem = Problem.checked(Operands(qkv), 7, 3)
        assert (
            explain(qkv, 7, 3) == explain(problem) == explain(qkv=qkv, window_size=7, shift_size=3)
        )
        assert REFERENCE.name in explain(problem)

    def test_bad_subject_and_bad_call_raise(self):
        with pytest.raises(ValueError, match="explain: expected nothing"):
            explain("swin")
        with pytest.raises(ValueError, match="shift_size"):
            explain(torch.randn(1, 14, 14, 3, 2, 8), 7, 7)
