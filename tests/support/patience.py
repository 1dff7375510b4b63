"""How long tests wait for what should come at once, on however busy a machine."""

PATIENCE_SECONDS = 30.0
