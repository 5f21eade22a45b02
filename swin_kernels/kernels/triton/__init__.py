"""Triton kernels for NVIDIA and AMD GPUs.

`window`, `tile`, `gradients` and `table`, `forward`, `backward`, `backward_tiled` and
`backward_bias` are device code; `configs` and `plan` say what is launched, `launch` and `calls` do
it, `direct` once more without checks, `backend` offers it to dispatch. Importing `backend` imports
no Triton.
"""
