"""Tests, and the scripts that show what they show at length."""

import os

# One set of kernels on any processor. With AVX-512 the gradient in bfloat16 of a convolution of one cell, as p7 of these
# small images is, has entries that are not finite (torch 2.14).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
