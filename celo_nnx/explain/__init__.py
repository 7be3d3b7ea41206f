"""What a learned update rule does, by experiment: recorded, varied, with features left out; as a page.

==============  =========================================================================================
``subject``     finds the rule: a name of shipped weights, a theta file or a run folder
``record``      trains a small network with it, and keeps what the rule was given and what it did
``responses``   the step along each feature, the others as recorded; the first layer's weights
``pictures``    figures of both
``page``        all of it as one HTML file and one CSV file
==============  =========================================================================================

Every function works on a :class:`~celo_nnx.optimizer.LearnedOptimizer` whose update rule has a first layer
split by feature, as :class:`~celo_nnx.components.update_rules.split_mlp.SplitMLP` has.
"""
