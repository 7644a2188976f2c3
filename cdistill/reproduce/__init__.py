"""``cdistill reproduce``: the paper's tables in kind, as data, on one pair of models, over seeds.

Importing this package imports neither torch nor transformers.
"""
