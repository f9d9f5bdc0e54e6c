"""The forward pass of a batch: torch, and the compiled kernels where they are faster."""
