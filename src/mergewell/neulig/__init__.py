"""NeuLig: coefficients from what the experts see, so that merging agrees with ensembling.

Read `portland` (the network), `offsets` (the penalties), `training` (the losses), `modes` (what is
merged from it) and `agreement` (what is measured).
"""
