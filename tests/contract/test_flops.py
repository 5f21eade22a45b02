"""What torch.utils.flop_counter counts for the op."""

from __future__ import annotations

import pytest
from command_lines import last_line_of
from contract_cases import SHIFTED, over
from torch.utils.flop_counter import FlopCounterMode

from swin_kernels.testing import Case, call, make_operands, with_grad


@over(
    SHIFTED,
    SHIFTED.but(packed=True, cosine=True),
    SHIFTED.but(value_dim=24, mask="soft"),
    Case(2, (7,), (4,), (1,)),
    Case(1, (3, 4, 5), (2, 2, 2), (1, 0, 1)),
)
def test_products_are_those_of_unfused_layers(case, fused):
    def counted(function):
        operands = with_grad(make_operands(case))
        with FlopCounterMode(display=False) as forward:
            out = function(operands)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    unfused = counted(lambda operands: call(case, operands, "reference"))
    assert unfused[0] > 0
    assert counted(lambda operands: call(case, operands, fused)) == unfused


@pytest.mark.slow
def test_first_call_is_counted_and_the_package_imports_no_triton():
    """torch.utils.flop_counter imports triton, so formulas cannot be registered at import."""
    code = """
import sys, torch, swin_kernels
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    swin_kernels.shifted_window_attention_qkvpacked(torch.randn(1, 4, 4, 3, 2, 8), 2, 1)
print(counter.get_total_flops())
"""
    assert int(last_line_of(code)) == 2 * 2 * 4 * 2 * 4 * 4 * 8
