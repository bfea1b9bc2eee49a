"""Our own ServerApp and ClientApp, on presets (extra `app`).

`server` and `client` are what the two apps do; `build` makes model and data of the
settings, `strategies` the strategy, `training` trains; `grid` counts bytes and makes
runs repeatable, `runlog` writes a run's folder, `costs` counts operations, `export`
writes the final model. May import everything below `compare`.
"""
