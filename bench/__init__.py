"""The benchmarks of keye_ops, one script an op; installed as ``keye_ops.bench``."""
