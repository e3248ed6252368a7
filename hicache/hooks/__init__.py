"""How a transformer is watched: its block lists, the outputs of its modules, its head, its steps.

Hooks carry a plan (:mod:`hicache.step_plan`) out and note what came of it. They decide nothing.
"""
