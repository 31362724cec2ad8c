"""Faster forms of whole blocks, swapped in by class and back out; where one does not fit, the block's own forward runs."""
