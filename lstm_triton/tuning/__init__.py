"""Which config is the fastest? Those of a problem are run and timed (search), now or at a first call."""
