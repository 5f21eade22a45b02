"""The public operation: dispatch, autograd and the functions that users call."""
