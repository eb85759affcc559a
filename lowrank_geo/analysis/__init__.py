"""The theory of the optimizers, computed: what settings will do, to be checked against the real classes."""
