"""Where weights come from: one module for each kind of place, all with the shape of ``source.Source``."""
