"""Where bytes live: aligned host memory, direct disk I/O, packed weight stores, KV storage. Knows nothing of models'
formulas."""
