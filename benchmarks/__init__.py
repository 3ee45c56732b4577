"""What distrib costs over hand-written PyTorch, and next to Accelerate. Run it with `make bench`."""
