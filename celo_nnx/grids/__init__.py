"""Ablation grids: one file says which cells there are, each cell is a folder, one report compares them.

``grid_file`` reads a grid file, ``plan`` makes its cells, ``store`` is their folders, ``work`` runs one,
``local`` runs many as processes, ``drive`` holds a grid's folder together, ``effects`` are the numbers and
``status`` and ``report`` show them.

A grid's folder holds::

    grid.json            the question, axes and cells with their labels, in their order
    cells/ID/cell.json   a cell: resolved config, suite; its ID is a hash of these
    cells/ID/run/        the run folder of its meta-training
    cells/ID/evaluation/ the folder of its evaluation on the suite, where the grid names one
    cells/ID/attempts.jsonl  every start, stop and failure, with the reason
    cells/ID/log         what its processes printed
    cells/ID/result.json its numbers; a cell that has this is never run again
    lock                 held by the one driver that works here
"""
