"""A package outside deltaw, written from docs/extending.md alone: two methods, two kinds of host.

In a project of its own it would declare these entry points (the test does it in a file):

    [project.entry-points."deltaw.methods"]
    ia3_example = "plugin_example.ia3"
    parallel_example = "plugin_example.parallel"

    [project.entry-points."deltaw.hosts"]
    transposed = "plugin_example.transposed"
"""
