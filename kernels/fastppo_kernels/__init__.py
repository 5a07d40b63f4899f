"""Triton kernels of fastppo and their launchers. Imports torch and triton, never fastppo."""
