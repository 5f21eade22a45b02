"""The kernels behind the ops, one module per way to run them."""
