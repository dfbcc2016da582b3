"""The kernels: the matrix products of the layer, on 2-D arrays only.

A kernel is a module with the four functions of `xaffine.kernels.standard`. That one is the
implementation: every backend can run it.
"""
