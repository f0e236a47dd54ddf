"""Faster twins of plain functions: compiled tiles for CPUs, CUDA kernels for GPUs."""
