"""The Triton source of the GPU kernels and its ahead-of-time build; not part of the wheel."""
