"""A page in the browser that shows Spectral Forcing, trajectories of networks, and runs (docs/explorer.md)."""
