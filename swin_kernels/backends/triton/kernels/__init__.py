"""Device code alone: `@triton.jit` functions."""
