"""The examples: they run to the end and learn; several processes reach what one does; a killed run
resumes.
"""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_lines import PNG_MAGIC, ROOT, refusal

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="ships the digits")

# in float64, so that the order of sums is no excuse
TINY = ("--embed-dim", 16, "--drop-path", 0, "--dtype", "float64")
TINY += ("--batch", 8, "--steps", 12, "--save-every", 4)


def main_of(name: str) -> Callable:
    return importlib.import_module(f"examples.{name}").main


def run_here(name: str, *arguments: object) -> None:
    main_of(name)([str(a) for a in arguments])


def started(*arguments: object, processes: int = 1) -> subprocess.Popen:
    """The digits example, as a user starts it."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*torchrun, "-m"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "examples.digits", *map(str, (*TINY, *arguments))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(run: subprocess.Popen, code: int = 0) -> str:
    text, _ = run.communicate(timeout=300)
    assert run.returncode == code, text
    return text


def assert_weights_agree(out: Path, other: Path, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    ours, theirs = (torch.load(x / "model.pt", weights_only=True) for x in (out, other))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process leaves that nobody disturbs; its last checkpoint is that of step 8."""
    out = tmp_path_factory.mktemp("alone")
    finished(started("--out", out))
    return out


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_processes_reach_the_weights_of_one(wrap, alone, tmp_path):
    text = finished(started("--out", tmp_path, "--wrap", wrap, processes=2))
    assert text.count("test accuracy") == 1
    assert_weights_agree(tmp_path, alone)


def test_fsdp_goes_on_from_the_checkpoint_of_one_process(alone, tmp_path):
    shutil.copy(alone / "checkpoint.pt", tmp_path)
    finished(started("--out", tmp_path, "--wrap", "fsdp", "--resume", processes=2))
    assert_weights_agree(tmp_path, alone)


def test_a_killed_run_resumes_bit_for_bit(alone, tmp_path):
    run = started("--out", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "model.pt").exists()
    finished(started("--out", tmp_path, "--resume"))
    assert_weights_agree(tmp_path, alone, rtol=0, atol=0)
    assert (tmp_path / "loss.csv").read_text() == (alone / "loss.csv").read_text()


def test_digits_are_learnt_from_what_simmim_learnt(tmp_path, capsys, cpu_kernels):
    """Both examples at a small size, the second from the first's weights."""
    run_here("simmim", "--batch", 32, "--steps", 20, "--out", tmp_path / "simmim")
    assert "hidden pixels of 360 other digits" in capsys.readouterr().out
    assert (tmp_path / "simmim" / "reconstructed.png").read_bytes().startswith(PNG_MAGIC)
    init = ("--init", tmp_path / "simmim" / "model.pt")
    run_here("digits", "--batch", 32, "--steps", 200, "--out", tmp_path, *init)
    # the classifier's own head
    assert "model.pt: 2 tensors stay as they were" in capsys.readouterr().out
    assert float((tmp_path / "accuracy.txt").read_text()) > 0.35
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG_MAGIC)
    with open(tmp_path / "loss.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 200
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    ("name", "picture", "arguments"),
    [
        ("digits", "loss.png", ("--gate", "--embed-dim", 16)),
        ("unet", "unet.png", ("--size", 64)),
        ("mask_rcnn", "mask_rcnn.png", ("--size", 64)),
    ],
)
def test_examples_run_to_the_end(name, picture, arguments, tmp_path, cpu_kernels):
    run_here(name, "--steps", 2, "--batch", 4, "--out", tmp_path, *arguments)
    assert (tmp_path / picture).read_bytes().startswith(PNG_MAGIC)
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digits", ("--resume",), "--resume: there is no checkpoint.pt in"),
        ("digits", ("--init", "nowhere.pt"), "nowhere.pt"),
        ("simmim", ("--batch", 0), "--batch: expected at least 1"),
        ("simmim", ("--batch", 2000), "--batch: expected at most the 1437 images"),
        ("simmim", ("--embed-dim", 0), "embed_dim: expected a number of at least 1"),
        ("digits", ("--drop-path", 1.5), "drop_path: expected a probability"),
        ("digits", ("--lr", "nan"), "--lr: expected a number above 0"),
        ("unet", ("--warmup", -5), "--warmup: expected at least 0"),
        ("unet", ("--size", 8), "--size: expected at least 32"),
        ("mask_rcnn", ("--dtype", "float64"), "--dtype: torchvision's detectors"),
    ],
)
def test_bad_input_is_one_line(name, arguments, message, tmp_path, capsys):
    said = refusal(main_of(name), ["--out", tmp_path, *arguments], capsys)
    assert message in said.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_resume_forgets_the_one_before(alone, tmp_path, cpu_kernels):
    shutil.copy(alone / "checkpoint.pt", tmp_path)
    run_here("digits", "--steps", 2, "--batch", 4, "--embed-dim", 16, "--out", tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_is_no_checkpoint_is_one_line(tmp_path, cpu_kernels):
    (tmp_path / "checkpoint.pt").write_text("none")
    with pytest.raises(SystemExit, match="is no checkpoint of these examples"):
        run_here("digits", "--steps", 2, "--out", tmp_path, "--resume")


def test_a_run_is_not_resumed_as_another(alone, tmp_path):
    shutil.copy(alone / "checkpoint.pt", tmp_path)
    text = finished(started("--out", tmp_path, "--resume", "--gate"), code=1)
    assert "was started with --gate False" in text
