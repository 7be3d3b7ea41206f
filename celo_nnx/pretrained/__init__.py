"""Published weights in and out: the trees of the papers' code, their container, PyLO's files, the Hub."""
