"""Home of fastppo's Triton kernels and their launchers. Imports torch and triton, never fastppo."""
