"""Routings: which tensor takes which rule, decided once at init. One file and one line here add one."""

from celo_nnx.components.routing.patterns import Celo2Routing, Regex, SingleRoute, Table

ROUTINGS = {
    "single": SingleRoute,
    "regex": Regex,
    "celo2": Celo2Routing,
    "table": Table,
}
