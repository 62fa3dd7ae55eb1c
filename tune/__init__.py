"""The search over lambda distributions and encodings. Floor 2: may import `oat_dist` and `kernels`."""
