"""The study: what S-CFG and adapters do on the embedded base. Run it with `python -m benchmarks.study`."""
