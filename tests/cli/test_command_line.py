"""`python -m swin_kernels`: what it refuses, in a line; what stops it; what explain prints."""

from __future__ import annotations

import os
import shlex
from unittest.mock import Mock

import pytest
import torch
from command_lines import output_of, refusal

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub.constants")

import swin_kernels
from swin_kernels.__main__ import main
from swin_kernels.cli import command, demo, inputs

SIZE = "whole numbers of at least 1, got"
MASK = "--mask-value: expected a float32 number or -inf, got"
FILE = "--out: expected a file to write, such as x.png, got"
REFUSED = [
    ("", "expected a command: demo, bench, explain or picture"),
    ("paint", "invalid choice: 'paint'"),
    ("--wat", "unrecognized arguments: --wat"),
    ("explain demo", "unrecognized arguments: demo"),
    ("explain --device cpu", "unrecognized arguments: --device cpu"),
    ("demo --model swin_tinyy", "nearest are swin_tiny_patch4_window7_224"),
    ("demo --model swin_tiny_patch4_window7_224.bogus", "expected one of ms_in1k, ms_in22k"),
    ("demo --model swin_base_patch4_window7_224_in22k.bogus", "no pretrained tag 'bogus'"),
    ("demo --model resnet18", "no window attention found"),
    ("demo --image no/such.jpg", "--image: expected a photo, but there is no file 'no/such.jpg'"),
    ("demo --image folder", "--image: expected a photo, but there is no file 'folder'"),
    ("demo --image file", "is not an image; expected a PNG or JPEG"),
    ("demo --image cut.png", "that cannot be read"),
    ("demo --batch 0", "whole number of at least 1, got '0'"),
    ("demo --batch 2.5", "whole number of at least 1, got '2.5'"),
    ("demo --batch", "expected one argument"),
    ("demo --batch 99999999999999999999", "of memory; expected at most"),
    ("demo --rounds many", "whole number of at least 1, got 'many'"),
    ("demo --threads -1", "whole number of at least 1, got '-1'"),
    ("demo --threads 100000", f"expected at most {os.cpu_count()}, the CPUs of this machine"),
    ("demo --device foo", "--device: cannot use 'foo': expected cpu, cuda or cuda:N"),
    ("demo --device mps", "--device: cannot use 'mps': expected cpu, cuda or cuda:N"),
    ("demo --device cuda:99", "--device: cannot use 'cuda:99': "),
    ("demo --out file/x", "--out: cannot write into 'file/x': Not a directory"),
    ("demo --out file", "--out: cannot write into 'file': File exists"),
    ("demo --out ''", "--out: expected a folder, got an empty name"),
    ("demo --no-such-option", "--no-such-option; `python -m swin_kernels demo --help` lists the"),
    ("demo photo.jpg", "unrecognized arguments: photo.jpg"),
    ("bench --model swin_tinyy", "nearest are swin_tiny_patch4_window7_224"),
    ("bench --model resnet18", "no window attention found"),
    ("bench --model resnet18 --size 64", "--size: resnet18 cannot be made for 64×64"),
    ("bench --size 0", f"argument --size: expected N or HxW, {SIZE} '0'"),
    ("bench --size 32xwide", f"argument --size: expected N or HxW, {SIZE} '32xwide'"),
    ("bench --size 224x", f"--size: expected N or HxW, {SIZE} '224x'"),
    ("bench --size 1x2x3", f"{SIZE} '1x2x3'"),
    ("bench --size 1", "cannot run on 4×3×1×1 float32"),
    ("bench --model swinv2_tiny_window8_256 --size 1", "cannot be made for 1×1"),
    ("bench --model nowhere:make --size 24", "cannot call 'nowhere:make': ModuleNotFoundError"),
    ("bench --model math:pi --size 24", "--model: cannot call 'math:pi': TypeError"),
    ("bench --model builtins:list --size 24", "'builtins:list' returned list, no torch.nn.Module"),
    ("bench --model somewhere:make", "--size: expected one, N or HxW, with a model of your own"),
    ("bench --batch 99999999999999", "--batch: 99999999999999 images of 224×224 do not fit"),
    ("bench --size 100000 --batch 1", "--batch: 1 images of 100000×100000 do not fit"),
    ("bench --dtype int8", "invalid choice: 'int8'"),
    ("bench --device foo", "--device: cannot use 'foo'"),
    ("bench --batch 0", "whole number of at least 1, got '0'"),
    ("picture --size six 6", "argument --size: expected a whole number, got 'six'"),
    ("picture --size 6", "argument --size: expected 2 arguments"),
    ("picture --shift 3", "expected 0 <= shift < window"),
    ("picture --window 3 3 3", "window_size"),
    ("picture --only biases", "--only"),
    ("picture --bias nowhere.pt", ": nowhere.pt: No such file or directory"),
    ("picture --bias nowhere.pt --size 8 8", "--size has no meaning with --bias"),
    ("picture --bias nowhere.pt --mask-value 3", "--mask-value has no meaning with --bias"),
    ("picture --block 0 1", "--block has no meaning with no --bias"),
    ("picture --mask-value nan", f"{MASK} 'nan'"),
    ("picture --mask-value -nan", f"{MASK} '-nan'"),
    ("picture --mask-value inf", f"{MASK} 'inf'"),
    ("picture --mask-value=+inf", f"{MASK} '+inf'"),
    ("picture --mask-value -1e39", f"{MASK} '-1e39'"),
    ("picture --mask-value x", f"{MASK} 'x'"),
    ("picture --mask-value", "--mask-value: expected one argument"),
    ("picture --out file/x.png", "--out: cannot write 'file/x.png': "),
    ("picture --out ''", f"{FILE} an empty name"),
    ("picture --out .", f"{FILE} the directory '.'"),
    ("picture --out new/", f"{FILE} the directory 'new/'"),
]
if not torch.cuda.is_available():
    REFUSED.append(("bench --device cuda", "--device: cannot use 'cuda'"))


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:swin_kernels.patch")
def test_bad_input_gets_one_line_and_exit_code_2_and_writes_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # no test waits for a connection
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "cut.png").write_bytes(inputs.find_photo().read_bytes()[:2000])
    (line,) = refusal(main, shlex.split(arguments), capsys).splitlines()
    assert message in line
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file", "cut.png"}


def test_unknown_pretrained_tag_is_refused_before_anything_is_done(monkeypatch, capsys):
    monkeypatch.setattr(inputs, "read_photo", lambda path: pytest.fail("a photo was read"))
    refusal(main, ["demo", "--model", "swin_tiny_patch4_window7_224.bogus"], capsys)


@pytest.mark.parametrize("tag", ["", ".ms_in22k"])
def test_known_pretrained_tag_is_accepted(tag):
    inputs.check_name(f"swin_tiny_patch4_window7_224{tag}")


def test_as_many_threads_as_cpus_are_accepted():
    assert command.threads(str(os.cpu_count())) == os.cpu_count()


def _stop(monkeypatch, error: BaseException) -> None:
    """Has a run of the demo end with an error."""
    monkeypatch.setattr(demo, "prepare", Mock())
    monkeypatch.setattr(demo, "run", Mock(side_effect=error))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x.png"), 1, "x.png: No space left on device"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
            2,
            "not enough memory: expected a smaller --batch or --size",
        ),
    ],
    ids=["interrupt", "disk", "memory"],
)
def test_what_stops_a_run_gets_one_line(monkeypatch, capsys, error, code, message):
    _stop(monkeypatch, error)
    (line,) = refusal(main, ["demo"], capsys, code).splitlines()
    assert message in line


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    _stop(monkeypatch, RuntimeError("an index is out of range"))
    with pytest.raises(RuntimeError, match="out of range"):
        main(["demo"])


def test_explain_command_prints_what_explain_says(capsys):
    assert output_of(capsys, main, ["explain"]) == swin_kernels.explain() + "\n"
