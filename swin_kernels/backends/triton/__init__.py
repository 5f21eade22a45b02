"""Triton kernels for NVIDIA and AMD GPUs.

`kernels` are device code; `config` and the plans say what is launched, `launcher` and `calls` do
it, `direct` once more without checks, `backend` offers it to dispatch. Importing `backend` imports
no Triton.
"""
