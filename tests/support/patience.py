"""How long tests wait for what should come at once, on however busy a machine."""

PATIENCE_SECONDS = 30.0

LONG_SECONDS = 10 * PATIENCE_SECONDS
"""What does not pass while a test waits: neither it nor a third of it, when leases are renewed."""
