"""What `benchmarks/gpu.py` runs in processes of their own: checks and speeds on an accelerator."""
