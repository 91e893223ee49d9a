"""Process groups, meshes, collectives, consistency checks, the watchdog, data parallelism."""
