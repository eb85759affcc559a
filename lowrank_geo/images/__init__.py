"""Medical images: reading them, training on them, and saying how good the result is.

`lowrank_geo.images.run` holds `train` and `resume`, behind `lowrank-geo segment` and `lowrank-geo classify`. Nothing
is imported here: the readers need the packages of `pip install 'lowrank-geo[images]'`, the rest does not.
"""
