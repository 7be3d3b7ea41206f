"""Ablation grids as data, one file a grid: read by ``celo_nnx.grids``."""
