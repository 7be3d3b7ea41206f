"""Suites of evaluation tasks as data, one file a suite: read by ``celo_nnx.evaluation.suites``."""
