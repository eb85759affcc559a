"""Pre-training: the loop, and the folder of a run that survives being killed.

`lowrank_geo.train.run` holds `pretrain` and `resume`. Nothing is imported here, because the report reads run folders
and the loop writes the report.
"""
