"""Which examples an epoch sees, and in which order: arrays of positions, never the rows.

`filter` reads the filter expression, `prints` tells equal examples, `splits` holds some out, and
`mixture` puts several sources together. See docs/mixtures.md.
"""
