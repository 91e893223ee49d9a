"""What a run records: metrics, telemetry, curves and the report page."""
