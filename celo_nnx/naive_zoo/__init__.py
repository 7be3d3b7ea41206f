"""Plain twins of the published optimizers: each a second time, without this project's parts or tricks.

A twin works tensor by tensor on stacked features ``[*S, C]``, as published code does, and fulfils
:class:`celo_nnx.interfaces.Optimizer`; it shares no code with ``celo_nnx.components`` and
``celo_nnx.optimizer``, so that each checks the other. :mod:`celo_nnx.naive` has Celo2.
"""
