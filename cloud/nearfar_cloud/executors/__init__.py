"""What runs a batch: here, in another process, or on a clock."""
