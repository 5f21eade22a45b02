"""A timm Swin on a photograph, patched against stock: the same numbers, and what they cost."""
